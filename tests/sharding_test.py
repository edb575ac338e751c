"""Tests of the mesh, the table of axes, and what moves between devices."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grit_jax import losses, sharding
from grit_jax.batch import EmbeddingRows, GenerativeRows
from grit_jax.config import (
  Config,
  EvaluationConfig,
  MemoryConfig,
  MeshConfig,
  ModelConfig,
)
from grit_jax.errors import UserError
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Decoder
from grit_jax.pooling import pool
from grit_jax.sharding import (
  gather,
  join_rows,
  make_mesh,
  place,
  spec,
  split_rows,
  weight_spec,
)

# Float32 sums over two layers and 16 rows, in another order, relative to the
# largest entry.
MESH_TOLERANCE = 1e-5

MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)]
# All axes, of these four: `fsdp` in two steps, and together with `tensor`.
COMPUTED = [(2, 4, 1), (2, 2, 2)]

# Sizes that divide over every mesh above, and a vocabulary that does not.
CONFIG = ModelConfig(
  vocab_size=101,
  embed_dim=32,
  num_layers=2,
  num_heads=8,
  num_kv_heads=4,
  head_dim=10,
  mlp_dim=48,
  dtype='float32',
)

COLLECTIVE = re.compile(
  r' (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)'
)


def find_collectives(program: jax.stages.Compiled) -> list[str]:
  """The lines of a compiled program that move data between devices."""
  lines = program.as_text().splitlines()
  return [line for line in lines if COLLECTIVE.search(line)]


@pytest.fixture(scope='session')
def streams(pack: Callable) -> tuple[EmbeddingRows, GenerativeRows]:
  """Eight rows of texts and sixteen of conversations, on the host."""
  first = pack(*['iitt|itt', 'ttttt|itt'] * 4, length=10, seed=1)
  second = pack(*['iittt', 'itt|iitt', 'ttttttttt', 't'] * 4, length=10, seed=2)
  none = np.zeros((0,), np.int32)
  weights = np.random.default_rng(0).random(second.tokens.shape)
  weights = (weights * (second.positions > 0)).astype(np.float32)
  return (
    EmbeddingRows(first, none, none, none, np.int32(0)),
    GenerativeRows(second, weights, np.int32(0)),
  )


def place_rows(mesh: Mesh, batch):
  """Puts each [R, T] field on the mesh by rows."""
  return jax.tree.map(
    lambda x: place(mesh, x, 'rows', 'seq') if x.ndim == 2 else x, batch
  )


def loss(
  model: Decoder, embedding: EmbeddingRows, generative: GenerativeRows
) -> jax.Array:
  """A loss of both streams through one pass."""
  states = model(
    [embedding.rows, generative.rows],
    [Kind.BIDIRECTIONAL, Kind.CAUSAL],
    remat='full',
  )
  pooled = pool(states[0], embedding.rows, 'mean', 2)
  return jnp.sin(pooled).sum() + losses.next_token_loss(
    model, states[1], generative
  )


@pytest.fixture(scope='session')
def results(
  mesh_of: Callable, random_decoder: Callable, streams: tuple
) -> Callable:
  """Loss and gradient of `loss` on a mesh, and the compiled program."""
  known = {}

  def compute(*sizes: int) -> tuple:
    if sizes not in known:
      mesh = mesh_of(*sizes)
      model = random_decoder(mesh, CONFIG)
      with jax.set_mesh(mesh):
        batch = [place_rows(mesh, stream) for stream in streams]
        program = jax.jit(jax.value_and_grad(loss)).lower(model, *batch)
        program = program.compile()
        known[sizes] = (*program(model, *batch), model, program)
    return known[sizes]

  return compute


@pytest.fixture(autouse=True, scope='module')
def several_chunks_of_logits():
  """Lets the tokens of a device take several chunks."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(losses.LOGIT_TOKENS, 'cpu', 4)
    yield


@pytest.mark.parametrize('sizes', COMPUTED)
def test_loss_and_gradient_are_those_of_one_device(
  results: Callable, sizes: tuple
):
  expected_loss, expected, *_ = results(1, 1, 1)
  actual_loss, actual, *_ = results(*sizes)
  np.testing.assert_allclose(actual_loss, expected_loss, rtol=MESH_TOLERANCE)
  paths = jax.tree_util.tree_leaves_with_path(expected)
  for (path, x), y in zip(paths, jax.tree.leaves(actual), strict=True):
    scale = np.abs(x).max()
    assert scale > 0
    np.testing.assert_allclose(
      y, x, atol=MESH_TOLERANCE * scale, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize('sizes', COMPUTED)
def test_gradients_are_sharded_as_their_weights(
  results: Callable, sizes: tuple
):
  _, gradient, model, program = results(*sizes)
  _, compiled = program.output_shardings
  weights = jax.tree_util.tree_leaves_with_path(model)
  shardings = jax.tree.leaves(compiled)
  for (path, x), y, z in zip(
    weights, jax.tree.leaves(gradient), shardings, strict=True
  ):
    assert y.sharding.is_equivalent_to(x.sharding, x.ndim), path
    assert z.is_equivalent_to(x.sharding, x.ndim), path


def test_a_gather_and_its_gradient_go_step_by_step(mesh_of: Callable):
  # The CPU compiler writes a reduce-scatter as all-reduce and slice, so what
  # shows here is the order: over `fsdp` whole, over `pair` what `fsdp` leaves,
  # and a shard over `data`. Devices are numbered data, pair, fsdp.
  mesh = mesh_of(2, 4, 1)
  assert dict(mesh.shape) | {'pair': 2, 'fsdp': 2} == dict(mesh.shape)
  with jax.set_mesh(mesh):
    stored = weight_spec('embed', 'mlp')
    weight = jax.device_put(np.ones((64, 24), 'float32'), stored)
    x = place(mesh, np.ones((16, 5, 64), 'float32'), 'rows', 'seq', 'embed')

    def use(weight: jax.Array, x: jax.Array) -> jax.Array:
      whole = gather(weight, 'embed', 'mlp', dtype='float32')
      return jnp.sin(jnp.einsum('btd,df->btf', x, whole)).sum()

    program = jax.jit(jax.grad(use)).lower(weight, x).compile()
  assert program.output_shardings.is_equivalent_to(weight.sharding, 2)
  moves = find_collectives(program)
  sums = [line for line in moves if ' all-reduce' in line]
  sums += [line for line in moves if ' reduce-scatter' in line]
  assert len(sums) == 3
  for groups, shape in (
    ('{{0,1},{2,3},{4,5},{6,7}}', 'f32[64,24]'),
    ('{{0,2},{1,3},{4,6},{5,7}}', 'f32[32,24]'),
    ('{{0,4},{1,5},{2,6},{3,7}}', 'f32[16,24]'),
  ):
    [line] = [line for line in sums if groups in line]
    assert shape in line
  gathers = [line for line in moves if ' all-gather' in line]
  assert len(gathers) == 2
  assert sum('f32[32,24]' in line.split(' all-gather')[0] for line in gathers)


def test_gather_is_in_the_dtype_of_use_and_its_gradient_in_the_stored(
  mesh_of: Callable,
):
  mesh = mesh_of(1, 8, 1)
  with jax.set_mesh(mesh):
    weight = jax.device_put(
      np.ones((64, 24), 'float32'), weight_spec('embed', 'mlp')
    )

    def use(weight: jax.Array) -> jax.Array:
      return gather(weight, 'embed', 'mlp', dtype='bfloat16')

    whole = jax.eval_shape(use, weight)
    text = jax.jit(use).lower(weight).as_text()
    x = place(mesh, np.ones((8, 5, 64), 'float32'), 'rows', 'seq', 'embed')
    x = x.astype('bfloat16')
    gradient = jax.eval_shape(
      jax.grad(lambda w: jnp.einsum('btd,df->btf', x, use(w)).sum()), weight
    )
  assert whole.dtype == 'bfloat16'
  assert gradient.dtype == 'float32'
  # The CPU compiler widens what it moves: this is before it.
  moves = [x for x in text.splitlines() if 'sharding_constraint' in x]
  assert moves
  assert all('tensor<64x24xbf16>' in move for move in moves)


@pytest.mark.parametrize('axes', [(), ('seq', 'heads')])
def test_split_rows_undoes_join_rows_and_nothing_moves(
  mesh_of: Callable, axes: tuple
):
  mesh = mesh_of(2, 2, 2)
  shape = (3, 4)[: len(axes)]
  rows = (8, 12, 4)
  arrays = [
    np.random.default_rng(n).random((n, *shape), dtype='float32') for n in rows
  ]

  def round_trip(streams: list[jax.Array]) -> tuple:
    joined = join_rows(streams)
    return joined, split_rows(joined, rows)

  with jax.set_mesh(mesh):
    streams = [place(mesh, x, 'rows', *axes) for x in arrays]
    program = jax.jit(round_trip).lower(streams).compile()
    joined, parts = program(streams)
  assert find_collectives(program) == []
  assert joined.sharding.spec[0] == sharding.ROWS
  for part, stream in zip(parts, streams, strict=True):
    np.testing.assert_array_equal(part, stream)
    assert part.sharding.is_equivalent_to(stream.sharding, part.ndim)
  # Each shard holds its own rows of the first stream, of the second, ...
  for shard in joined.addressable_shards:
    start = shard.index[0].start // 6
    expected = [x[start * len(x) // 4 :][: len(x) // 4] for x in arrays]
    np.testing.assert_array_equal(
      shard.data, np.concatenate(expected)[(slice(None), *shard.index[1:])]
    )


def test_a_plain_concatenation_moves_rows(mesh_of: Callable):
  mesh = mesh_of(2, 2, 2)
  with jax.set_mesh(mesh):
    x = place(mesh, np.ones((8, 3), 'float32'), 'rows', 'seq')
    program = jax.jit(lambda x: jnp.concatenate([x, x])).lower(x).compile()
  assert find_collectives(program)


def test_a_single_stream_is_neither_joined_nor_split(one_device: Mesh):
  x = jnp.ones((4, 3))
  assert join_rows([x]) is x
  assert split_rows(x, [4])[0] is x


def test_weights_are_born_in_their_stored_sharding_and_alike_on_every_mesh(
  mesh_of: Callable,
):
  config = dataclasses.replace(CONFIG, projection_dim=6)
  models = []
  # As runs compile it: the settings of `conftest` round otherwise where arrays
  # are split.
  options = {'xla_cpu_opt_preset': 'CPU_OPT_PRESET_DEFAULT'}
  draw = jax.jit(
    lambda: Decoder(config, jax.random.key(0)), compiler_options=options
  )
  for sizes in ((1, 1, 1), (2, 2, 2)):
    with jax.set_mesh(mesh_of(*sizes)):
      models.append(draw())
  jax.tree.map(np.testing.assert_array_equal, *models)
  model, blocks = models[1], models[1].blocks
  expected = {
    P(('tensor', 'fsdp'), None): [model.embed],
    P('fsdp', 'tensor'): [model.head],
    P(None, 'fsdp', 'tensor'): [
      blocks.attention.q, blocks.attention.k, blocks.attention.v,
      blocks.mlp.gate, blocks.mlp.up,
    ],
    P(None, ('tensor', 'fsdp'), None): [blocks.attention.o, blocks.mlp.down],
    P('fsdp', None): [model.projection],
    P(None, None): [blocks.attention_norm, blocks.mlp_norm],
    P(None): [model.final_norm, model.projection_bias],
  }  # fmt: skip
  count = 0
  for stored, weights in expected.items():
    for weight in weights:
      array = weight[...]
      wanted = jax.sharding.NamedSharding(array.sharding.mesh, stored)
      assert array.sharding.is_equivalent_to(wanted, array.ndim), stored
      count += 1
  assert count == len(jax.tree.leaves(model))


def test_stored_specs_put_fsdp_on_the_first_axis_after_the_layers():
  stored = ('fsdp', 'pair', 'expert')
  assert weight_spec('embed', 'mlp') == P(stored, 'tensor')
  assert weight_spec('mlp', 'embed') == P(('tensor', *stored), None)
  assert weight_spec('layers', 'embed', 'mlp') == P(None, stored, 'tensor')
  rows = ('data', 'pair', 'fsdp', 'expert')
  assert spec('rows', None, 'heads') == P(rows, None, 'tensor')


def test_stored_specs_of_experts_split_them_and_then_their_first_axis():
  stored = ('fsdp', 'pair')
  assert weight_spec('experts', 'embed', 'mlp') == P('expert', stored, 'tensor')
  assert weight_spec('experts', 'mlp', 'embed') == P(
    'expert', ('tensor', *stored), None
  )


def test_two_logical_axes_on_one_mesh_axis_raise():
  with pytest.raises(ValueError, match="'heads', 'mlp'.* twice"):
    spec('heads', 'mlp')
  with pytest.raises(ValueError, match="'mlp', 'vocab'.* twice"):
    weight_spec('mlp', 'vocab')
  with pytest.raises(ValueError, match="'embed', 'rows'.* twice"):
    weight_spec('embed', 'rows')


def test_an_unknown_logical_axis_raises():
  with pytest.raises(KeyError, match='rowz'):
    spec('rowz')


def test_an_axis_of_minus_one_takes_the_devices_left_over():
  assert dict(make_mesh(MeshConfig(2, -1, 2)).shape) == {
    'data': 2, 'pair': 1, 'fsdp': 2, 'expert': 1, 'tensor': 2
  }  # fmt: skip
  assert dict(make_mesh(MeshConfig()).shape) == {
    'data': 1, 'pair': 2, 'fsdp': 4, 'expert': 1, 'tensor': 1
  }  # fmt: skip
  mesh = make_mesh(MeshConfig(-1, 1, 1), jax.devices()[:3])
  assert mesh.shape['data'] == 3
  assert sharding.row_shards(make_mesh(MeshConfig(2, 2, 2))) == 4


def test_rows_are_split_over_the_experts_axis_too():
  assert sharding.row_shards(make_mesh(MeshConfig(1, 2, 2, 2))) == 4


def test_an_experts_axis_needs_experts_that_divide_over_it():
  mesh = make_mesh(MeshConfig(1, 1, 1, 8))
  with pytest.raises(
    UserError, match=r'mesh.expert=8, but model.num_experts=0'
  ):
    sharding.validate(make_config(), mesh)
  with pytest.raises(UserError, match=r'num_experts=4 .*mesh.expert=8'):
    sharding.validate(make_config(num_experts=4), mesh)
  sharding.validate(make_config(num_experts=8), mesh)


def test_a_mesh_that_does_not_fit_the_devices_raises():
  with pytest.raises(UserError, match='mesh.fsdp=3.* of 3 devices.* are 8'):
    make_mesh(MeshConfig(1, 3, 1))


def test_a_mesh_whose_rest_is_no_whole_number_raises():
  with pytest.raises(UserError, match='mesh.data=3.*8 devices.* by 3'):
    make_mesh(MeshConfig(3, -1, 1))


def make_config(**model: int) -> Config:
  """A config that divides over every mesh above."""
  return Config(
    model=dataclasses.replace(CONFIG, **model),
    evaluation=EvaluationConfig(rows=8),
  )


@pytest.mark.parametrize('sizes', MESHES)
def test_a_config_that_divides_is_valid(mesh_of: Callable, sizes: tuple):
  sharding.validate(make_config(), mesh_of(*sizes))


@pytest.mark.parametrize(
  ('changes', 'sizes', 'message'),
  [
    ({'num_heads': 6}, (1, 2, 4), r'model\.num_heads=6 .*mesh\.tensor=4'),
    ({'num_kv_heads': 2}, (1, 2, 4), r'model\.num_kv_heads=2 .*tensor=4'),
    ({'mlp_dim': 46}, (1, 2, 4), r'model\.mlp_dim=46 .*mesh\.tensor=4'),
    ({'mlp_dim': 44}, (1, 2, 4), r'model\.mlp_dim=44 .*mesh\.fsdp=8'),
    ({'embed_dim': 36}, (1, 8, 1), r'model\.embed_dim=36 .*mesh\.fsdp=8'),
    ({'num_heads': 2, 'head_dim': 2, 'num_kv_heads': 2}, (1, 8, 1),
     r'model\.num_heads\*head_dim=4 .*mesh\.fsdp=8'),
  ],
)  # fmt: skip
def test_a_model_that_does_not_divide_raises_and_names_the_key(
  mesh_of: Callable, changes: dict, sizes: tuple, message: str
):
  with pytest.raises(UserError, match=message):
    sharding.validate(make_config(**changes), mesh_of(*sizes))


def test_chunks_and_evaluation_rows_that_do_not_divide_raise(
  mesh_of: Callable,
):
  mesh = mesh_of(2, 4, 1)
  config = dataclasses.replace(make_config(), memory=MemoryConfig(chunk_rows=4))
  with pytest.raises(UserError, match=r'memory\.chunk_rows=4 .*fsdp=8'):
    sharding.validate(config, mesh)
  evaluation = EvaluationConfig(rows=12)
  config = dataclasses.replace(make_config(), evaluation=evaluation)
  with pytest.raises(UserError, match=r'evaluation\.rows=12 .*fsdp=8'):
    sharding.validate(config, mesh)
  evaluation = EvaluationConfig(rows=12, enabled=False)
  config = dataclasses.replace(config, evaluation=evaluation)
  sharding.validate(config, mesh)


@pytest.mark.parametrize(
  ('vocab_size', 'padded'), [(1, 256), (256, 256), (257, 512), (32000, 32000)]
)
def test_the_vocabulary_is_padded_to_whole_multiples(
  vocab_size: int, padded: int
):
  config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
  assert sharding.padded_vocab(config) == padded


def test_place_gives_each_device_its_rows_and_heads(mesh_of: Callable):
  array = np.arange(8 * 2 * 4).reshape(8, 2, 4)
  placed = place(mesh_of(2, 2, 2), array, 'rows', 'seq', 'heads')
  np.testing.assert_array_equal(placed, array)
  assert {shard.data.shape for shard in placed.addressable_shards} == {
    (2, 2, 2)
  }
