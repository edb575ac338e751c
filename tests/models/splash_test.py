"""Tests of the splash kernel, interpreted, against attention in blocks."""

import functools
import re
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
)
from visibility import seen_by

from grit_jax import sharding
from grit_jax.batch import Rows
from grit_jax.config import ModelConfig
from grit_jax.models import attention, blockwise, splash
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Decoder

# Float32 sums over some hundred keys, blockwise and whole. The gradients, of
# size 10, are sums of as many products again.
OUT_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 3e-5
# Bfloat16 has 8 bits; the two round the softmax's weights, of size 1, at
# different places.
BFLOAT16_TOLERANCE = 2e-2

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
# Rows of three blocks of 128, the last partly padding of the kernel's own.
BLOCKS = (2, 300)
# Less than a block, and a row for each of four devices.
SHORT = (4, 64)
# With it the third block of queries sees no key of the first. The kernel's
# masks are three: causal, of both sides, and of the kinds with stretches, which
# share theirs.
WINDOW = 100
KINDS = [
  (Kind.CAUSAL, 0),
  (Kind.CAUSAL, WINDOW),
  (Kind.BIDIRECTIONAL, 0),
  (Kind.BIDIRECTIONAL, WINDOW),
  (Kind.INSTRUCTION, 0),
  (Kind.TEXT, WINDOW),
]


def draw_rows(shape: tuple[int, int]) -> Rows:
  """Uneven segments and stretches, some longer than a block.

  The first row is full, the others have padding; the fourth nothing else.
  """
  rng = np.random.default_rng(3)
  segments = np.zeros(shape, np.int32)
  positions = np.zeros(shape, np.int32)
  instruction = np.zeros(shape, bool)
  tokens = shape[1]
  for row in range(shape[0]):
    start, number = 0, 1
    real = tokens - row * tokens // 3
    while start < real:
      stop = min(start + int(rng.integers(1, tokens)), real)
      segments[row, start:stop] = number
      positions[row, start:stop] = np.arange(stop - start)
      while start < stop:
        end = min(start + int(rng.integers(1, 2 * tokens // 3)), stop)
        instruction[row, start:end] = rng.random() < 0.5
        start = end
      number += 1
  return Rows(np.zeros_like(segments), segments, positions, instruction)


def draw_heads(
  shape: tuple[int, int], dtype: str = 'float32'
) -> list[np.ndarray]:
  """Queries, keys, values, and a cotangent of the output."""
  rng = np.random.default_rng(1)
  return [
    rng.standard_normal((*shape, heads, HEAD_DIM)).astype(dtype)
    for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
  ]


@functools.cache
def differentiate(kind: Kind, window: int, kernel: str) -> Callable:
  """Returns the program of the output and the gradients of q, k and v."""

  def run(rows: Rows, q, k, v, cotangent) -> tuple[jax.Array, ...]:
    attend = attention.prepare(rows, kind, window, kernel)
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(cotangent)

  return jax.jit(run)


def place(mesh, rows: Rows, heads: list[np.ndarray]) -> tuple:
  rows = jax.tree.map(lambda x: sharding.place(mesh, x, 'rows', 'seq'), rows)
  axes = ('heads', 'kv_heads', 'kv_heads', 'heads')
  return rows, *(
    sharding.place(mesh, x, 'rows', 'seq', axis, 'head_dim')
    for x, axis in zip(heads, axes, strict=True)
  )


def assert_equals_blocks(arguments: tuple, kind: Kind, window: int) -> None:
  # Padding sees nothing there, and the other padding here.
  real = np.asarray(arguments[0].segments) > 0
  found = differentiate(kind, window, 'splash')(*arguments)
  expected = differentiate(kind, window, 'xla')(*arguments)
  for name, x, y in zip(('out', 'q', 'k', 'v'), found, expected, strict=True):
    assert x.sharding.spec == y.sharding.spec
    tolerance = OUT_TOLERANCE if name == 'out' else GRADIENT_TOLERANCE
    x, y = np.asarray(x)[real], np.asarray(y)[real]
    np.testing.assert_allclose(x, y, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(('kind', 'window'), KINDS)
def test_output_and_gradients_equal_those_of_blocks(
  one_device: Mesh, kind: Kind, window: int
):
  arguments = place(one_device, draw_rows(BLOCKS), draw_heads(BLOCKS))
  assert_equals_blocks(arguments, kind, window)


# The kinds without stretches are on a mesh in `objective_test`.
def test_rows_and_heads_split_over_the_mesh(mesh_of: Callable):
  mesh = mesh_of(2, 2, 2)
  with jax.set_mesh(mesh):
    arguments = place(mesh, draw_rows(SHORT), draw_heads(SHORT))
    assert_equals_blocks(arguments, Kind.INSTRUCTION, 0)


@pytest.mark.parametrize(('kind', 'window'), KINDS)
def test_gradient_reaches_what_the_mode_says_and_nothing_else(
  one_device: Mesh, kind: Kind, window: int
):
  rows = draw_rows(BLOCKS)
  q, k, v, cotangent = draw_heads(BLOCKS)
  run = differentiate(kind, window, 'splash')
  rng = np.random.default_rng(2)
  real = rows.segments > 0
  for positions in rng.integers(real.sum(axis=1), size=(4, BLOCKS[0])):
    one = np.zeros_like(cotangent)
    every = np.arange(BLOCKS[0])
    one[every, positions] = cotangent[every, positions]
    _, *gradients = run(*place(one_device, rows, [q, k, v, one]))
    # Of the output of one token, the gradient of a value is its weight, and
    # no weight of these scores underflows.
    reached = np.abs(gradients[2]).sum(axis=(2, 3)) > 0
    seen = np.stack(
      [seen_by(rows, row, t, kind, window) for row, t in enumerate(positions)]
    )
    np.testing.assert_array_equal(reached, seen)
    assert not np.abs(gradients[1])[~seen].any()


@pytest.mark.parametrize(('kind', 'window'), KINDS)
def test_padding_reaches_no_text(one_device: Mesh, kind: Kind, window: int):
  rows = draw_rows(BLOCKS)
  real = rows.segments > 0
  *heads, cotangent = draw_heads(BLOCKS)
  cotangent[real] = 0
  run = differentiate(kind, window, 'splash')
  _, *gradients = run(*place(one_device, rows, [*heads, cotangent]))
  for gradient in gradients:
    assert np.any(np.asarray(gradient)[~real])
    assert not np.any(np.asarray(gradient)[real])


def test_bfloat16_heads_give_bfloat16_near_the_float32_result(one_device: Mesh):
  arguments = place(one_device, draw_rows(SHORT), draw_heads(SHORT, 'bfloat16'))
  found = differentiate(Kind.CAUSAL, 0, 'splash')(*arguments)
  wide = [x.astype('float32') for x in arguments[1:]]
  expected = differentiate(Kind.CAUSAL, 0, 'xla')(arguments[0], *wide)
  real = np.asarray(arguments[0].segments) > 0
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == 'bfloat16'
    x, y = np.asarray(x, np.float32)[real], np.asarray(y)[real]
    scale = np.abs(y).max()
    np.testing.assert_allclose(x / scale, y / scale, atol=BFLOAT16_TOLERANCE)


def test_too_long_rows_of_a_window_and_stretches_raise(one_device: Mesh):
  tokens = splash.MAX_WINDOWED_TOKENS + 1
  x = np.zeros((1, tokens, 1, 8), 'float32')
  ids = np.zeros((1, tokens), 'int32')
  with pytest.raises(ValueError, match='32769 tokens'):
    splash.attend(x, x, x, ids, splash.Band(4, 4), last=ids)


@functools.cache
def lower_for_tpu(kernel: str, window: int) -> str:
  """Lowers a decoder's gradient, of all kinds, for TPUs that are not there."""
  tokens = 1024
  config = ModelConfig(
    vocab_size=256,
    embed_dim=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=512,
    sliding_window=window,
  )
  mesh = AbstractMesh(
    (1, 1, 2, 1, 2),
    sharding.AXES,
    (AxisType.Explicit,) * len(sharding.AXES),
    abstract_device=AbstractDevice('TPU v5 lite', None, platform='tpu'),
  )
  with jax.sharding.use_abstract_mesh(mesh):

    def shape(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      stored = NamedSharding(mesh, x.sharding.spec)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stored)

    def field(dtype: str) -> jax.ShapeDtypeStruct:
      stored = NamedSharding(mesh, sharding.spec('rows', 'seq'))
      return jax.ShapeDtypeStruct((2, tokens), dtype, sharding=stored)

    model = jax.tree.map(
      shape, jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    )
    streams = [Rows(*map(field, ('int32',) * 3), field('bool')) for _ in Kind]

    def loss(model: Decoder, streams: list[Rows]) -> jax.Array:
      hidden = model(streams, list(Kind), 'full', kernel)
      return sum(x.astype('float32').sum() for x in hidden)

    traced = jax.jit(jax.grad(loss)).trace(model, streams)
    return traced.lower(lowering_platforms=('tpu',)).as_text()


@pytest.mark.parametrize('window', [0, 256])
def test_program_for_tpus_has_the_kernels_and_no_whole_scores(window):
  program = lower_for_tpu('auto', window)
  kernels = re.findall(r'kernel_name = "splash_mha_(\w+?)_', program)
  assert {'fwd', 'dq', 'dkv'} == set(kernels)
  # Causal, bidirectional, and the two with stretches, which share theirs.
  assert all(kernels.count(name) >= 3 for name in kernels)
  pairs = re.compile(r'tensor<(?:\d+x)*1024x1024x\w+>')
  assert not pairs.findall(program)
  program = lower_for_tpu('xla', window)
  assert not pairs.findall(program)
  # The scores of a block of queries, two heads together, and a block of keys.
  assert f'x{2 * blockwise.QUERIES}x{blockwise.KEYS}xf32>' in program
