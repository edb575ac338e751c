import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from grit_jax import objective, sharding
from grit_jax.batch import EmbeddingRows
from grit_jax.config import (
  Config,
  DataConfig,
  MemoryConfig,
  MeshConfig,
  ObjectiveConfig,
)
from grit_jax.data.dataset import prepare
from grit_jax.data.filling import RowShards
from grit_jax.data.pipeline import Pipeline, place_batch
from grit_jax.data.sources import TRAIN, sources
from grit_jax.data.tokenizer import SentencePieceTokenizer
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.models import presets
from grit_jax.models.decoder import Decoder
from grit_jax.optimizer import make_optimizer, make_schedule

# float32 sums in another order over up to 8 devices or chunks; the values are
# of order 1, and a temperature of 0.02 multiplies an embedding's by 50.
MESH_TOLERANCE = 1e-5

MESHES = [(1, 8, 1), (8, 1, 1), (2, 2, 2)]  # data, fsdp, tensor
# The same, and expert.
EXPERT_MESHES = [
  (1, 8, 1, 1), (1, 1, 1, 8), (1, 2, 1, 4), (1, 1, 2, 1), (1, 1, 2, 4)
]  # fmt: skip


def words(rng: np.random.Generator, count: int) -> str:
  letters = 'abcdefghij'
  return ' '.join(
    ''.join(rng.choice(list(letters), rng.integers(1, 5))) for _ in range(count)
  )


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A folder with records of both kinds, and a tokenizer."""
  folder = tmp_path_factory.mktemp('objective')
  rng = np.random.default_rng(0)
  texts = [words(rng, 6) for _ in range(200)]
  with open(folder / 'pairs.jsonl', 'w') as file:
    for i in range(48):
      record = {
        'query': ['find ' + texts[i][:3], words(rng, 3)],
        # Some positives are those of several records, so that the loss masks
        # false negatives.
        'pos': [['', texts[i % 7] if i % 3 else words(rng, 10)]],
        'neg': [['', words(rng, 5)], ['', words(rng, 9)]],
      }
      file.write(json.dumps(record) + '\n')
  with open(folder / 'chats.jsonl', 'w') as file:
    for _ in range(48):
      turns = [
        words(rng, int(rng.integers(2, 6)))
        for _ in range(2 * int(rng.integers(1, 3)))
      ]
      file.write(json.dumps({'text': turns}) + '\n')
  tokenizer = SentencePieceTokenizer(train_tokenizer(texts, 300))
  found = sources(str(folder))
  sets = {
    source.kind: prepare(
      source,
      TRAIN,
      tokenizer,
      folder / 'cache',
      max_query_tokens=48,
      max_passage_tokens=64,
      max_generative_tokens=64,
      min_negatives=2,
      held_out_fraction=0.0,
    )
    for source in found
  }
  return sets


def make_config(**changes) -> Config:
  config = Config(
    model=dataclasses.replace(
      presets.tiny(), vocab_size=300, num_kv_heads=2, projection_dim=12
    ),
    objective=ObjectiveConfig(
      embedding_weight=0.7, generative_weight=1.3, mixed_groups=4
    ),
    data=DataConfig(
      paths='unused',
      embedding_batch=12,
      generative_batch=16,
      num_passages=3,
      max_query_tokens=48,
      max_passage_tokens=64,
      max_generative_tokens=64,
      row_length=64,
      max_segments=4,
    ),
    steps=2,
  )
  return dataclasses.replace(config, **changes)


def make_expert_config(**changes) -> Config:
  config = make_config(**changes)
  model = dataclasses.replace(
    presets.tiny_moe(), vocab_size=300, projection_dim=12
  )
  # Weights of their terms that make them as large as the others.
  terms = dataclasses.replace(
    config.objective,
    generative_router_weight=0.5,
    embedding_router_weight=0.3,
    router_z_weight=0.1,
  )
  return dataclasses.replace(config, model=model, objective=terms)


def gradient_on(data, config: Config, shape: tuple[int, ...]):
  """The loss, metrics and gradient of step 0 on a mesh, in numpy."""
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = sharding.make_mesh(MeshConfig(*shape), devices)
  sharding.validate(config, mesh)
  mode = config.objective
  pipeline = Pipeline(
    config,
    [data['embedding']] if mode.has_embedding else [],
    [data['generative']] if mode.has_generative else [],
    # The same rows on every mesh; chunks are of fewer.
    RowShards.whole(4 if config.memory.chunk_rows else 8),
  )
  host = pipeline.build(0)
  function = (
    objective.cached_gradient
    if config.memory.chunk_rows
    else objective.one_pass_gradient
  )
  with jax.set_mesh(mesh):
    model = jax.jit(lambda rng: Decoder(config.model, rng))(jax.random.key(1))
    batch = place_batch(mesh, host.batch)
    # Weights ten times their initial scale: the losses must not hide in the
    # flat beginning.
    model = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, model)
    gradient, metrics = jax.jit(function, static_argnums=2)(
      model, batch, config
    )
    return jax.tree.map(np.asarray, (model, gradient, metrics)), host


def assert_equal_gradients(one, other) -> None:
  leaves = jax.tree_util.tree_leaves_with_path(one)
  for (path, expected), found in zip(
    leaves, jax.tree.leaves(other), strict=True
  ):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
      found / scale,
      expected / scale,
      atol=MESH_TOLERANCE,
      err_msg=jax.tree_util.keystr(path),
    )


@pytest.fixture(scope='module')
def one_device(data):
  (model, gradient, metrics), host = gradient_on(data, make_config(), (1, 1, 1))
  masked = np.sum(~host.batch.embedding.scored)
  assert metrics['masked_negatives'] == masked > 0
  return model, gradient, metrics, host


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
    loss, metrics = objective.representation_loss(placed, batch, config)
  np.testing.assert_allclose(loss, np.mean(losses), rtol=MESH_TOLERANCE)
  assert metrics['in_batch_accuracy'] == np.float32(np.mean(right))
  possible = 15 if negatives == 'hard' else 75
  assert metrics['masked_negatives'] == possible - scored.sum()


@pytest.mark.parametrize('shape', MESHES)
def test_loss_and_gradient_do_not_depend_on_the_mesh(data, one_device, shape):
  _, gradient, metrics, _ = one_device
  (_, found, found_metrics), _ = gradient_on(data, make_config(), shape)
  for name in metrics:
    np.testing.assert_allclose(
      found_metrics[name], metrics[name], rtol=MESH_TOLERANCE, err_msg=name
    )
  assert_equal_gradients(gradient, found)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
def test_chunks_give_the_one_pass_gradient(data, one_device, shape):
  _, gradient, metrics, _ = one_device
  config = make_config(memory=MemoryConfig(chunk_rows=4))
  (_, found, found_metrics), host = gradient_on(data, config, shape)
  assert int(host.batch.embedding.chunks) > 2
  for name in metrics:
    np.testing.assert_allclose(
      found_metrics[name], metrics[name], rtol=MESH_TOLERANCE, err_msg=name
    )
  assert_equal_gradients(gradient, found)


def test_attention_kernels_give_one_loss_and_gradient(data, one_device):
  _, gradient, metrics, _ = one_device
  config = make_config(attention_kernel='splash')
  (_, found, found_metrics), _ = gradient_on(data, config, (1, 2, 2))
  for name in metrics:
    np.testing.assert_allclose(
      found_metrics[name], metrics[name], rtol=MESH_TOLERANCE, err_msg=name
    )
  assert_equal_gradients(gradient, found)


@pytest.fixture(scope='module')
def experts_on_one_device(data):
  results, _ = gradient_on(data, make_expert_config(), (1, 1, 1))
  return results


@pytest.mark.parametrize('shape', EXPERT_MESHES)
def test_experts_loss_and_gradient_do_not_depend_on_the_mesh(
  data, experts_on_one_device, shape
):
  _, gradient, metrics = experts_on_one_device
  (_, found, found_metrics), _ = gradient_on(data, make_expert_config(), shape)
  assert len(metrics) == 5 + 2 * (4 + 8)
  for name in metrics:
    np.testing.assert_allclose(
      found_metrics[name], metrics[name], rtol=MESH_TOLERANCE, err_msg=name
    )
  assert_equal_gradients(gradient, found)


@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (1, 2, 1, 2)])
def test_chunks_give_the_one_pass_gradient_of_experts(
  data, experts_on_one_device, shape
):
  _, gradient, metrics = experts_on_one_device
  config = make_expert_config(memory=MemoryConfig(chunk_rows=4))
  (_, found, found_metrics), host = gradient_on(data, config, shape)
  assert int(host.batch.generative.chunks) > 2
  for name in metrics:
    np.testing.assert_allclose(
      found_metrics[name], metrics[name], rtol=MESH_TOLERANCE, err_msg=name
    )
  assert_equal_gradients(gradient, found)


def test_every_router_term_is_in_the_loss(data, experts_on_one_device):
  _, _, metrics = experts_on_one_device
  config = make_expert_config()
  terms = config.objective
  expected = (
    terms.embedding_weight * metrics['loss_rep']
    + terms.generative_weight * metrics['loss_gen']
    + terms.embedding_router_weight * metrics['router_rep/balance_loss']
    + terms.generative_router_weight * metrics['router_gen/balance_loss']
    + terms.router_z_weight
    * (metrics['router_rep/z_loss'] + metrics['router_gen/z_loss'])
  )
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-6)
  # Well above the even share, or the gradient of the balance would be that of
  # nothing.
  assert metrics['router_gen/busiest'] > 1.25 / config.model.num_experts


def test_temporary_memory_falls_with_the_rows_of_a_chunk(data):
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  temporary = []
  for chunk_rows in (0, 8, 2):
    # Wide enough for the activations to outweigh the weights and the cache.
    config = make_config(memory=MemoryConfig(chunk_rows=chunk_rows))
    config = dataclasses.replace(
      config, model=dataclasses.replace(config.model, mlp_dim=512)
    )
    pipeline = Pipeline(
      config, [data['embedding']], [data['generative']], RowShards.whole(1)
    )
    function = (
      objective.cached_gradient if chunk_rows else objective.one_pass_gradient
    )
    with jax.set_mesh(mesh):
      model = jax.jit(lambda rng: Decoder(config.model, rng))(  # noqa: B023
        jax.random.key(1)
      )
      batch = place_batch(mesh, pipeline.build(0).batch)
      compiled = (
        jax.jit(function, static_argnums=2)
        .lower(model, batch, config)
        .compile()
      )
    temporary.append(compiled.memory_analysis().temp_size_in_bytes)
  one_pass, eight, two = temporary
  assert two < 0.7 * eight and eight < 0.7 * one_pass, temporary


@pytest.mark.parametrize('chunk_rows', [0, 4])
def test_step_compiles_once_a_bucket(data, chunk_rows):
  config = make_config(memory=MemoryConfig(chunk_rows=chunk_rows), steps=6)
  config = dataclasses.replace(
    config,
    # Small batches, so that their rows differ in number.
    data=dataclasses.replace(
      config.data, row_buckets=2, embedding_batch=2, generative_batch=4
    ),
  )
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  pipeline = Pipeline(
    config, [data['embedding']], [data['generative']], RowShards.whole(1)
  )
  optimizer = make_optimizer(config.optimizer, config.steps)
  step = objective.make_train_step(
    config,
    optimizer,
    make_schedule(config.optimizer, config.steps),
    compiler_options={},
  )
  with jax.set_mesh(mesh):
    model = jax.jit(lambda rng: Decoder(config.model, rng))(jax.random.key(0))
    state = jax.jit(partial(objective.create_state, optimizer))(model)
    shapes = set()
    for host in pipeline.iterate():
      batch = place_batch(mesh, host.batch)
      shapes.add(
        (
          batch.embedding.rows.tokens.shape,
          batch.generative.loss_weights.shape,
        )
      )
      state, _ = step(state, batch)
  assert int(state.step) == 6
  assert len(shapes) == (1 if chunk_rows else 2)
  assert step._cache_size() == len(shapes)


def test_weights_of_the_objective_scale_its_parts(data, one_device):
  _, _, metrics, _ = one_device
  expected = 0.7 * metrics['loss_rep'] + 1.3 * metrics['loss_gen']
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-6)
