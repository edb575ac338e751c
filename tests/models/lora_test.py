"""Tests of adapters: against the merged weight, on meshes, in both streams."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding

from grit_jax import objective
from grit_jax.batch import Batch, EmbeddingRows, GenerativeRows
from grit_jax.config import (
  Config,
  DataConfig,
  LoraConfig,
  MemoryConfig,
  MeshConfig,
  ModelConfig,
)
from grit_jax.data.pipeline import place_batch
from grit_jax.models import presets
from grit_jax.models.decoder import Decoder
from grit_jax.models.lora import (
  Dropout,
  add_adapters,
  drop,
  join_trained,
  split_trained,
)
from grit_jax.models.projections import find_part, projection_axes
from grit_jax.models.quantization import quantize
from grit_jax.sharding import make_mesh, place

# Float32 sums in another order, or with a product split in two.
TOLERANCE = 1e-5

DENSE = dataclasses.replace(
  presets.tiny(), embed_dim=48, head_dim=32, num_kv_heads=2, mlp_dim=128
)
EXPERTS = dataclasses.replace(DENSE, num_experts=4)
LORA = LoraConfig(rank=4, alpha=6.0, base='float32')
LENGTH, ROWS = 20, 8


def make_config(model: ModelConfig = DENSE, **changes) -> Config:
  data = DataConfig(
    paths='unused',
    embedding_batch=8,
    generative_batch=8,
    num_passages=2,
    row_length=LENGTH,
    max_segments=4,
  )
  return dataclasses.replace(
    Config(model=model, data=data, lora=LORA), **changes
  )


@pytest.fixture(scope='module')
def batch(pack: Callable) -> Batch:
  """Eight rows of three texts, and eight of conversations, on the host."""
  first = pack(*['iitt|ittt|ttttt', 'tttt|iit|ttt'] * 4, length=LENGTH, seed=1)
  second = pack(*['iittt', 'itt|iitt', 'ttttttttt', 't'] * 2, length=LENGTH)
  slots = np.arange(ROWS)[:, None] * 4 + np.arange(3)
  weights = np.random.default_rng(0).random(second.tokens.shape)
  return Batch(
    EmbeddingRows(
      first,
      slots[:, 0].astype(np.int32),
      slots[:, 1:].astype(np.int32),
      np.ones((ROWS, 2 * ROWS), bool),
      np.int32(0),
    ),
    GenerativeRows(
      second,
      (weights * (second.positions > 0)).astype(np.float32),
      np.int32(0),
    ),
  )


def chunk(batch: Batch, size: int) -> Batch:
  """The same rows in chunks."""

  def of(stream):
    split = jax.tree.map(
      lambda x: x.reshape(-1, size, LENGTH) if x.shape == (ROWS, LENGTH) else x,
      stream,
    )
    return dataclasses.replace(split, chunks=np.int32(ROWS // size))

  return Batch(of(batch.embedding), of(batch.generative))


def abstract_adapters(model: Decoder, lora: LoraConfig) -> Decoder:
  """The shapes of a decoder with adapters, of its arrays or their shapes."""
  mesh = jax.sharding.get_mesh()
  adapted = jax.eval_shape(
    lambda model: add_adapters(model, lora, jax.random.key(0)), model
  )
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
    ),
    adapted,
  )


def draw_adapted(
  mesh: Mesh, random_decoder: Callable, config: Config, kind: str = ''
) -> Decoder:
  """A decoder with adapters whose second factor is random too."""
  model = random_decoder(mesh, config.model)
  if kind:
    model = quantize(model, kind)
  own = dict(jax.tree_util.tree_leaves_with_path(model))
  rng = np.random.default_rng(1)

  def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if path in own:
      return own[path]
    values = 0.1 * rng.standard_normal(leaf.shape)
    return jax.device_put(values.astype('float32'), leaf.sharding)

  with jax.set_mesh(mesh):
    shapes = abstract_adapters(model, config.lora)
  return jax.tree_util.tree_map_with_path(fill, shapes)


def gradient_on(
  sizes: MeshConfig,
  random_decoder: Callable,
  batch: Batch,
  config: Config,
  kind: str = '',
  key: jax.Array | None = None,
):
  """The gradient and the metrics on a mesh, in numpy."""
  devices = jax.devices()[: np.prod(dataclasses.astuple(sizes))]
  mesh = make_mesh(sizes, devices)
  function = objective.one_pass_gradient
  if config.memory.chunk_rows:
    function = objective.cached_gradient
    batch = chunk(batch, config.memory.chunk_rows)
  with jax.set_mesh(mesh):
    model = draw_adapted(mesh, random_decoder, config, kind)
    trained, frozen = split_trained(model)
    gradient, metrics = jax.jit(function, static_argnums=2)(
      trained, place_batch(mesh, batch), config, frozen, key
    )
  return jax.tree.map(np.asarray, (gradient, metrics))


def assert_close(found, expected) -> None:
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, one), other in zip(leaves, jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(
      other, one, atol=TOLERANCE * np.abs(one).max(),
      err_msg=jax.tree_util.keystr(path),
    )  # fmt: skip


# One program for the draws of all of them.
add_new_adapters = jax.jit(add_adapters, static_argnums=1)


def losses_of(mesh: Mesh, model: Decoder, batch: Batch, config: Config) -> dict:
  loss = jax.jit(objective.one_pass_loss, static_argnums=2)
  return loss(model, place_batch(mesh, batch), config)[1]


@pytest.mark.parametrize(
  ('model', 'dtype'),
  [(DENSE, 'bfloat16'), (EXPERTS, 'float32')],
  ids=['dense', 'experts'],
)
def test_new_adapters_change_no_bit(
  model, dtype, one_device, random_decoder, batch
):
  config = make_config(dataclasses.replace(model, dtype=dtype))
  plain = random_decoder(one_device, config.model)
  adapted = add_new_adapters(plain, LORA, jax.random.key(0))
  assert len(jax.tree.leaves(adapted)) == len(jax.tree.leaves(plain)) + 14
  batch = place_batch(one_device, batch)
  streams = [batch.embedding.rows, batch.generative.rows]
  kinds = [
    objective.embedding_kind('bbcc'), objective.generative_kind('bbcc')
  ]  # fmt: skip
  run = jax.jit(lambda model: model(streams, kinds))
  for one, other in zip(run(plain), run(adapted), strict=True):
    assert np.asarray(one).any()
    np.testing.assert_array_equal(one, other)


def merge(adapted: Decoder, plain: Decoder) -> Decoder:
  """Adds what the adapters are, in float64, to the weights without them."""
  for path in projection_axes(plain.config):
    parent, _, name = path.rpartition('/')
    adapter = find_part(adapted, parent).adapters[name]
    a = np.asarray(adapter.a[...], np.float64)
    b = np.asarray(adapter.b[...], np.float64)
    weight = find_part(plain, path)
    merged = np.asarray(weight[...]) + LORA.alpha / LORA.rank * np.einsum(
      '...ir,...or->...io', a, b
    )
    stored = weight[...].sharding
    weight[...] = jax.device_put(merged.astype('float32'), stored)
  return plain


def test_losses_of_experts_are_those_of_the_merged_weights(
  one_device, random_decoder, batch
):
  config = make_config(EXPERTS)
  adapted = draw_adapted(one_device, random_decoder, config)
  plain = random_decoder(one_device, EXPERTS)
  without = losses_of(one_device, plain, batch, config)
  found = losses_of(one_device, adapted, batch, config)
  merged = merge(adapted, plain)
  expected = losses_of(one_device, merged, batch, config)
  assert_equal_losses(found, expected, without)


def assert_equal_losses(found: dict, expected: dict, without: dict) -> None:
  """And those without the adapters are others."""
  for name in ('loss_rep', 'loss_gen'):
    np.testing.assert_allclose(found[name], expected[name], rtol=TOLERANCE)
    assert abs(without[name] - expected[name]) > 1e-2


ONE = MeshConfig(1, 1, 1, 1)


@pytest.fixture(scope='module')
def gradients(random_decoder, batch) -> Callable:
  """The gradient on one device, of a model and a key of dropout or none."""
  known = {}

  def compute(model: ModelConfig, drops: bool, kind: str = '') -> tuple:
    name = (model, drops, kind)
    if name not in known:
      config = make_config(model, lora=with_dropout(drops))
      key = jax.random.key(5) if drops else None
      known[name] = gradient_on(ONE, random_decoder, batch, config, kind, key)
    return known[name]

  return compute


def with_dropout(drops: bool) -> LoraConfig:
  return dataclasses.replace(LORA, dropout=0.5) if drops else LORA


def assert_equal_results(found: tuple, expected: tuple) -> None:
  """Compares two results of `gradient_on`."""
  assert_close(found[0], expected[0])
  assert found[1].keys() == expected[1].keys()
  for name, value in expected[1].items():
    np.testing.assert_allclose(
      found[1][name], value, rtol=TOLERANCE, err_msg=name
    )


# Experts that travel in one pass, and those that stay in chunks.
@pytest.mark.e2e
@pytest.mark.parametrize(
  ('sizes', 'chunk_rows'),
  [(MeshConfig(1, 2, 2, 2), 0), (MeshConfig(1, 4, 2, 1), 4)],
)
def test_gradients_depend_neither_on_the_mesh_nor_on_chunks(
  sizes, chunk_rows, random_decoder, batch, gradients
):
  config = make_config(EXPERTS, memory=MemoryConfig(chunk_rows=chunk_rows))
  found = gradient_on(sizes, random_decoder, batch, config, 'nf4')
  assert_equal_results(found, gradients(EXPERTS, False, 'nf4'))


@pytest.mark.e2e
def test_what_is_dropped_depends_neither_on_remat_nor_chunks_nor_mesh(
  random_decoder, batch, gradients
):
  expected = gradients(DENSE, True)
  without = gradients(DENSE, False)
  assert abs(expected[1]['loss'] - without[1]['loss']) > 1e-3
  config = make_config(
    lora=with_dropout(True),
    memory=MemoryConfig(remat='offload', chunk_rows=4),
  )
  found = gradient_on(
    MeshConfig(2, 2, 2, 1), random_decoder, batch, config, key=jax.random.key(5)
  )
  assert_equal_results(found, expected)


def test_losses_and_gradients_are_those_of_the_merged_weights(
  one_device, random_decoder, batch, gradients
):
  """By hand: dL/dA = s dL/dW B, and dL/dB = s dL/dW' A."""
  config = make_config()
  found, losses = gradients(DENSE, False)
  adapted = draw_adapted(one_device, random_decoder, config)
  plain = random_decoder(one_device, DENSE)
  gradient_of = jax.jit(objective.one_pass_gradient, static_argnums=2)
  placed = place_batch(one_device, batch)
  _, without = gradient_of(plain, placed, config)
  of_merged, expected = gradient_of(merge(adapted, plain), placed, config)
  assert_equal_losses(losses, expected, without)
  scale = LORA.alpha / LORA.rank
  for path in projection_axes(DENSE):
    parent, _, name = path.rpartition('/')
    adapter = find_part(adapted, parent).adapters[name]
    gradient = find_part(found, parent).adapters[name]
    of_weight = np.asarray(find_part(of_merged, path)[...])
    a, b = np.asarray(adapter.a[...]), np.asarray(adapter.b[...])
    assert_close(
      (gradient.a[...], gradient.b[...]),
      (
        scale * of_weight @ b,
        scale * np.swapaxes(of_weight, -1, -2) @ a,
      ),
    )


def test_only_adapters_are_trained_and_have_optimizer_state(
  one_device, random_decoder, batch
):
  config = make_config(steps=3)
  model = draw_adapted(one_device, random_decoder, config, 'nf4')
  trained, frozen = split_trained(model)
  before = jax.tree.map(np.asarray, frozen)
  optimizer = optax.adam(1e-2)
  step = objective.make_train_step(
    config, optimizer, optax.constant_schedule(1e-2), {}
  )
  state = objective.create_state(optimizer, trained)
  sizes = sum(x.size for x in jax.tree.leaves(trained))
  assert sum(x.size for x in jax.tree.leaves(state)) == 3 * sizes + 2
  placed = place_batch(one_device, batch)
  losses = []
  for _ in range(3):
    state, metrics = step(state, placed, frozen)
    losses.append(float(metrics['loss']))
  assert losses[2] < losses[1] < losses[0]
  jax.tree.map(np.testing.assert_array_equal, frozen, before)
  joined = join_trained(state.model, frozen)
  assert jax.tree.structure(joined) == jax.tree.structure(model)


def abstract_decoder(config: ModelConfig) -> Decoder:
  """The shapes of a decoder on the current mesh."""
  mesh = jax.sharding.get_mesh()
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
    ),
    jax.eval_shape(lambda: Decoder(config, jax.random.key(0))),
  )


def test_frozen_weights_take_no_gradient_memory(one_device, batch):
  """Weights that outweigh activations: the step has little beside them."""
  wide = dataclasses.replace(DENSE, embed_dim=512, mlp_dim=1024, num_layers=4)
  config = make_config(wide)
  plain = abstract_decoder(wide)
  placed = place_batch(one_device, Batch(None, batch.generative))
  memory = []
  for model in plain, abstract_adapters(plain, LORA):
    trained, frozen = split_trained(model)
    compiled = jax.jit(objective.one_pass_gradient, static_argnums=2)
    compiled = compiled.lower(trained, placed, config, frozen).compile()
    found = compiled.memory_analysis()
    memory.append(found.temp_size_in_bytes + found.output_size_in_bytes)
  # Of float32, in the three projections of each layer's MLP.
  stored = 4 * 3 * wide.num_layers * wide.embed_dim * wide.mlp_dim
  assert memory[0] - memory[1] > 0.9 * stored


def test_frozen_experts_that_tokens_go_to_have_no_gradient(batch):
  """Nor is it computed in the backward pass of the journey, by rounds."""
  mesh = make_mesh(MeshConfig(1, 1, 1, 2), jax.devices()[:2])
  config = make_config(EXPERTS)
  of_a_device = (2, DENSE.embed_dim, DENSE.mlp_dim)
  with jax.set_mesh(mesh):
    plain = abstract_decoder(EXPERTS)
    placed = place_batch(mesh, batch)
    for model, products in (
      (plain, True),
      (abstract_adapters(plain, LORA), False),
    ):
      trained, frozen = split_trained(model)
      traced = jax.make_jaxpr(objective.one_pass_gradient, static_argnums=2)(
        trained, placed, config, frozen
      )
      results = set(find_products(traced.jaxpr))
      assert results
      assert (of_a_device in results) == products


def find_products(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
  """Yields the shapes of all products by group, however deep."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'ragged_dot_general':
      yield from (out.aval.shape for out in equation.outvars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from find_products(inner)


def test_dropped_inputs_are_as_many_and_the_others_larger(one_device):
  tokens = place(one_device, np.arange(200).reshape(4, 50), 'rows', 'seq')
  x = jnp.ones((4, 50, 64))
  dropout = Dropout(jax.random.key(0), tokens)
  dropped = np.asarray(drop(x, 'up', 0.25, dropout))
  assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
  # Five standard deviations of a mean of 12800.
  assert abs((dropped == 0).mean() - 0.25) < 5 * (0.25 * 0.75 / 12800) ** 0.5
  # Of a token's number alone, and of its projection.
  backwards = place(
    one_device, np.arange(200).reshape(4, 50)[::-1], 'rows', 'seq'
  )
  other = np.asarray(drop(x, 'up', 0.25, Dropout(dropout.key, backwards)))
  np.testing.assert_array_equal(other[::-1], dropped)
  assert (np.asarray(drop(x, 'gate', 0.25, dropout)) != dropped).any()
  assert (dropped[0] != dropped[1]).any()


def test_steps_drop_other_inputs(one_device, random_decoder, batch):
  config = make_config(lora=with_dropout(True))
  model = draw_adapted(one_device, random_decoder, config)
  trained, frozen = split_trained(model)
  step = objective.make_train_step(
    config, optax.sgd(0.0), optax.constant_schedule(0.0), {}
  )
  placed = place_batch(one_device, Batch(None, batch.generative))
  losses = []
  for number in 0, 1, 0:
    state = objective.create_state(optax.sgd(0.0), trained)
    state = dataclasses.replace(state, step=jnp.int32(number))
    state = jax.tree.map(jnp.copy, state)
    losses.append(float(step(state, placed, frozen)[1]['loss']))
  assert losses[0] == losses[2] != losses[1]


@pytest.mark.e2e
def test_adapters_of_full_rank_learn_what_all_weights_learn(
  one_device, random_decoder, batch
):
  """From the same start, at the same rate, on one batch."""
  model = dataclasses.replace(DENSE, num_layers=1)
  config = make_config(
    model, lora=LoraConfig(rank=48, alpha=48.0, base='float32')
  )
  placed = place_batch(one_device, Batch(None, batch.generative))
  starts, ends = [], []
  for adapted in False, True:
    decoder = random_decoder(one_device, model)
    if adapted:
      decoder = add_new_adapters(decoder, config.lora, jax.random.key(0))
    trained, frozen = split_trained(decoder)
    optimizer = optax.adam(3e-3)
    step = objective.make_train_step(
      config, optimizer, optax.constant_schedule(3e-3), {}
    )
    state = objective.create_state(optimizer, trained)
    losses = []
    for _ in range(40):
      state, metrics = step(state, placed, frozen)
      losses.append(float(metrics['loss']))
    starts.append(losses[0])
    ends.append(losses[-1])
  before = starts[0]
  assert starts[1] == pytest.approx(before, rel=TOLERANCE)
  assert ends[0] < 0.5 * before
  assert ends[1] < ends[0] + 0.1 * before
  assert before > 1
