"""Tests of the objective: its losses, on meshes, in chunks, by the step."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from objective_run import (
  MESH_TOLERANCE,
  Result,
  assert_equal,
  gradient_on,
  make_config,
  prepare_data,
)

from grit_jax import objective, sharding
from grit_jax.batch import EmbeddingRows
from grit_jax.config import Config, MemoryConfig, MeshConfig, ObjectiveConfig
from grit_jax.data.filling import RowShards
from grit_jax.data.pipeline import Pipeline, place_batch
from grit_jax.optimizer import make_optimizer, make_schedule


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> dict:
  """Data sets of both kinds."""
  return prepare_data(tmp_path_factory.mktemp('objective'))


def make_wide_config(**changes) -> Config:
  """Wide enough for the activations to outweigh the weights and the cache."""
  config = make_config(**changes)
  model = dataclasses.replace(config.model, mlp_dim=512)
  return dataclasses.replace(config, model=model)


@pytest.fixture(scope='module')
def compute(data: dict, random_decoder: Callable) -> Callable[..., Result]:
  """Computes the gradient of a config on a mesh."""

  def of(config: Config, *shape: int) -> Result:
    return gradient_on(data, random_decoder, config, shape)

  return of


@pytest.fixture(scope='module')
def expected(compute: Callable) -> Result:
  """The gradient on one device in one pass."""
  result = compute(make_wide_config(), 1, 1, 1)
  masked = np.sum(~result.host.batch.embedding.scored)
  assert result.metrics['masked_negatives'] == masked > 0
  return result


@pytest.mark.parametrize('negatives', ['all', 'hard'])
def test_representation_loss_is_that_of_the_texts_in_the_slots(negatives):
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices())
  rng = np.random.default_rng(0)
  pooled = rng.standard_normal((8, 4, 6)).astype(np.float32)
  slots = rng.permutation(32)[:20].reshape(5, 4).astype(np.int32)
  scored = rng.random((5, 5, 3)) < 0.5
  if negatives == 'hard':
    scored &= np.eye(5, dtype=bool)[..., None]
  scored[np.arange(5), np.arange(5), 0] = True
  config = make_config(objective=ObjectiveConfig(temperature=0.5))
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(
      config.data, embedding_batch=5, negatives=negatives
    ),
  )
  texts = pooled.astype(np.float64).reshape(32, 6)[slots]
  texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
  losses, right = [], []
  for query, own in enumerate(texts[:, 0]):
    positive = texts[query, 1] @ own / 0.5
    others = texts[:, 1:][scored[query]] @ own / 0.5
    losses.append(np.log(np.exp(others).sum()) - positive)
    right.append(positive == others.max())
  nothing = np.zeros((8, 4), bool)
  rows = EmbeddingRows(
    nothing, slots[:, 0], slots[:, 1:], scored.reshape(5, 15),
    np.int32(0),
  )  # fmt: skip
  with jax.set_mesh(mesh):
    batch = place_batch(mesh, rows)
    placed = sharding.place(mesh, pooled, 'rows', None, None)
    run = jax.jit(objective.representation_loss, static_argnums=2)
    loss, metrics = run(placed, batch, config)
  np.testing.assert_allclose(loss, np.mean(losses), rtol=MESH_TOLERANCE)
  assert metrics['in_batch_accuracy'] == np.float32(np.mean(right))
  possible = 15 if negatives == 'hard' else 75
  assert metrics['masked_negatives'] == possible - scored.sum()


def test_loss_and_gradient_do_not_depend_on_the_mesh(
  compute: Callable, expected: Result
):
  assert_equal(compute(make_wide_config(), 2, 2, 2), expected)


def test_chunks_on_a_mesh_give_the_one_pass_gradient(
  compute: Callable, expected: Result
):
  config = make_wide_config(memory=MemoryConfig(chunk_rows=4))
  # Weights are split over four devices, in two steps.
  found = compute(config, 1, 4, 2)
  assert int(found.host.batch.embedding.chunks) > 2
  assert_equal(found, expected)


def test_chunks_give_the_one_pass_gradient_in_less_memory(
  compute: Callable, expected: Result
):
  temporary = [expected.temporary_bytes]
  for chunk_rows in (8, 2):
    config = make_wide_config(memory=MemoryConfig(chunk_rows=chunk_rows))
    found = compute(config, 1, 1, 1)
    assert int(found.host.batch.embedding.chunks) > 1
    assert_equal(found, expected)
    temporary.append(found.temporary_bytes)
  one_pass, eight, two = temporary
  assert two < 0.7 * eight and eight < 0.7 * one_pass, temporary


def test_attention_kernels_give_one_loss_and_gradient(
  compute: Callable, expected: Result
):
  config = make_wide_config(attention_kernel='splash')
  assert_equal(compute(config, 1, 2, 2), expected)


@pytest.mark.parametrize(
  ('mode', 'chunk_rows', 'programs'), [('embedding', 0, 2), ('unified', 4, 1)]
)
def test_step_compiles_once_a_bucket(
  data: dict,
  random_decoder: Callable,
  mode: str,
  chunk_rows: int,
  programs: int,
):
  config = make_config(memory=MemoryConfig(chunk_rows=chunk_rows), steps=6)
  terms = dataclasses.replace(config.objective, mode=mode)
  config = dataclasses.replace(
    config,
    objective=terms,
    # Small batches, so that their rows differ in number.
    data=dataclasses.replace(
      config.data, row_buckets=2, embedding_batch=2, generative_batch=4
    ),
  )
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  generative = [data['generative']] if terms.has_generative else []
  pipeline = Pipeline(
    config, [data['embedding']], generative, RowShards.whole(1)
  )
  optimizer = make_optimizer(config.optimizer, config.steps)
  step = objective.make_train_step(
    config,
    optimizer,
    make_schedule(config.optimizer, config.steps),
    compiler_options={},
  )
  with jax.set_mesh(mesh):
    model = random_decoder(mesh, config.model)
    state = jax.jit(partial(objective.create_state, optimizer))(model)
    shapes = set()
    for host in pipeline.iterate():
      batch = place_batch(mesh, host.batch)
      shapes.add(tuple(x.shape for x in jax.tree.leaves(batch)))
      state, _ = step(state, batch)
  assert int(state.step) == 6
  assert len(shapes) == programs
  assert step._cache_size() == len(shapes)


def test_weights_of_the_objective_scale_its_parts(expected: Result):
  metrics = expected.metrics
  total = 0.7 * metrics['loss_rep'] + 1.3 * metrics['loss_gen']
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-6)
