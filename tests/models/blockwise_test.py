"""Tests of attention in blocks, against float64 with whole scores."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from grit_jax import sharding
from grit_jax.models import blockwise
from grit_jax.models.blockwise import KEYS, QUERIES

# Float32 sums over some hundred keys, in blocks; numbers of size 1.
OUT_TOLERANCE = 5e-6
# A key's gradient is a sum over some hundred queries of such sums.
GRADIENT_TOLERANCE = 3e-5
# Scores of some thousand have a float32 spacing of 2.4e-4, and that is a
# weight's relative error.
LARGE_TOLERANCE = 2e-3
# Bfloat16 has 8 bits: weights, values and results are rounded to them.
BFLOAT16_TOLERANCE = 2e-2

ROWS, HEADS, KV_HEADS, HEAD_DIM = 4, 6, 2, 8
# Queries and keys: one block, several with a rest, one query of a cache.
SIZES = [(7, 7), (300, 600), (1, 2 * KEYS), (300, 140)]


def draw(queries: int, keys: int, seed: int = 0) -> list[np.ndarray]:
  """Queries, keys and values, and a cotangent of the result."""
  rng = np.random.default_rng(seed)
  q, cotangent = rng.standard_normal((2, ROWS, queries, HEADS, HEAD_DIM))
  k, v = rng.standard_normal((2, ROWS, KV_HEADS, keys, HEAD_DIM))
  return [x.astype('float32') for x in (q, k, v, cotangent)]


def draw_stretches(queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
  """Any stretches: short and long ones, a tenth empty, the last row all."""
  rng = np.random.default_rng(1)
  first = rng.integers(keys, size=(ROWS, queries))
  length = rng.integers(1, rng.integers(2, keys + 2, size=(ROWS, queries)))
  last = np.minimum(first + length, keys) - 1
  last = np.where(rng.random((ROWS, queries)) < 0.1, first - 1, last)
  last[-1] = -1
  return first.astype('int32'), last.astype('int32')


def draw_band(
  queries: int, keys: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
  """A causal window, the last query at the last key."""
  last = np.arange(queries) + keys - queries
  first = np.maximum(last - window + 1, 0)
  return tuple(
    np.broadcast_to(x, (ROWS, queries)).astype('int32') for x in (first, last)
  )


def differentiate_in_float64(
  q, k, v, cotangent, first, last
) -> tuple[np.ndarray, ...]:
  """The result and the gradients of q, k and v, head by head."""
  q, k, v, cotangent = (x.astype(np.float64) for x in (q, k, v, cotangent))
  index = np.arange(k.shape[2])
  seen = (first[..., None] <= index) & (index <= last[..., None])
  out, q_gradient = np.zeros_like(q), np.zeros_like(q)
  k_gradient, v_gradient = np.zeros_like(k), np.zeros_like(v)
  for n in range(HEADS):
    shared = n // (HEADS // KV_HEADS)
    keys, values = k[:, shared], v[:, shared]
    scores = np.where(seen, q[:, :, n] @ keys.swapaxes(1, 2), -1e300)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * seen
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    out[:, :, n] = weights @ values
    by_weight = cotangent[:, :, n] @ values.swapaxes(1, 2)
    mean = (weights * by_weight).sum(axis=-1, keepdims=True)
    by_score = weights * (by_weight - mean)
    q_gradient[:, :, n] = by_score @ keys
    k_gradient[:, shared] += by_score.swapaxes(1, 2) @ q[:, :, n]
    v_gradient[:, shared] += weights.swapaxes(1, 2) @ cotangent[:, :, n]
  return out, q_gradient, k_gradient, v_gradient


@jax.jit
def differentiate(q, k, v, cotangent, first, last) -> tuple[jax.Array, ...]:
  """As `differentiate_in_float64`, of the package."""
  attend = functools.partial(blockwise.attend, first=first, last=last)
  out, pull_back = jax.vjp(attend, q, k, v)
  return out, *pull_back(cotangent)


def differentiate_anew(*arrays) -> tuple[jax.Array, ...]:
  """`differentiate`, traced again: for another value of a constant."""
  return jax.jit(lambda *arrays: differentiate.__wrapped__(*arrays))(*arrays)


def place(mesh: Mesh, arrays: list[np.ndarray], stretches: tuple) -> list:
  queries = ('rows', 'seq', 'heads', 'head_dim')
  keys = ('rows', 'kv_heads', 'seq', 'head_dim')
  logical = (queries, keys, keys, queries, *[('rows', 'seq')] * 2)
  return [
    sharding.place(mesh, x, *axes)
    for x, axes in zip((*arrays, *stretches), logical, strict=True)
  ]


def assert_close(
  found: tuple, expected: tuple, out_tolerance: float, tolerance: float
) -> None:
  for name, x, y in zip(('out', 'q', 'k', 'v'), found, expected, strict=True):
    limit = out_tolerance if name == 'out' else tolerance
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(x, y, atol=limit, err_msg=name)


def assert_equals_float64(
  mesh: Mesh, arrays: list[np.ndarray], stretches: tuple
) -> None:
  found = differentiate(*place(mesh, arrays, stretches))
  expected = differentiate_in_float64(*arrays, *stretches)
  assert_close(found, expected, OUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize(('queries', 'keys'), SIZES)
def test_any_stretches_equal_float64(one_device: Mesh, queries: int, keys: int):
  stretches = draw_stretches(queries, keys)
  assert_equals_float64(one_device, draw(queries, keys), stretches)


@pytest.mark.parametrize('window', [1, 50, KEYS, 600])
def test_windows_equal_float64(one_device: Mesh, window: int):
  stretches = draw_band(300, 600, window)
  assert_equals_float64(one_device, draw(300, 600), stretches)


def test_stretches_that_end_at_a_blocks_edge_equal_float64(one_device: Mesh):
  ends = [(0, KEYS - 1), (KEYS, KEYS), (KEYS - 1, KEYS), (KEYS, 599)]
  first, last = np.repeat(np.array(ends, 'int32')[:, :, None], 5, 2).swapaxes(
    0, 1
  )
  assert_equals_float64(one_device, draw(5, 600), (first, last))


def test_rows_and_heads_split_over_the_mesh(mesh_of: Callable):
  mesh = mesh_of(2, 2, 2)
  with jax.set_mesh(mesh):
    stretches = draw_stretches(150, 300)
    assert_equals_float64(mesh, draw(150, 300), stretches)


def test_query_that_sees_nothing_is_0_and_so_is_its_gradient(one_device: Mesh):
  first, last = draw_stretches(300, 300)
  empty = last < first
  assert 0 < empty[:-1].sum() and empty[-1].all()
  found = differentiate(*place(one_device, draw(300, 300), (first, last)))
  out, q_gradient, k_gradient, v_gradient = map(np.asarray, found)
  assert np.all(out[empty] == 0) and np.all(q_gradient[empty] == 0)
  assert np.all(out[~empty] != 0)
  assert np.all(k_gradient[-1] == 0) and np.all(v_gradient[-1] == 0)


def test_large_scores_neither_overflow_nor_vanish(one_device: Mesh):
  q, k, v, cotangent = draw(300, 300)
  arrays, stretches = [300 * q, k, v, cotangent], draw_stretches(300, 300)
  found = differentiate(*place(one_device, arrays, stretches))
  expected = differentiate_in_float64(*arrays, *stretches)
  # The keys' gradient has the queries, 300 times as large, as factors.
  found, expected = ((*x[:2], x[2] / 300, x[3]) for x in (found, expected))
  assert_close(found, expected, LARGE_TOLERANCE, LARGE_TOLERANCE)


def test_blocks_that_no_query_sees_are_not_read(one_device: Mesh):
  # Keys of the first block of queries begin at 20, those of the second at the
  # third quarter: no block has the keys between them, or the last quarter.
  index = np.arange(2 * QUERIES)
  first = np.where(index < QUERIES, 20, 2 * KEYS)
  last = np.where(index < QUERIES, KEYS - 1, 3 * KEYS - 1)
  stretches = [
    np.broadcast_to(x, (ROWS, 2 * QUERIES)).astype('int32')
    for x in (first, last)
  ]
  arrays = draw(2 * QUERIES, 4 * KEYS)
  expected = differentiate_in_float64(*arrays, *stretches)
  for x in arrays[1:3]:
    x[:, :, KEYS + 20 : 2 * KEYS] = np.nan
    x[:, :, 3 * KEYS :] = np.nan
  found = differentiate(*place(one_device, arrays, stretches))
  assert_close(found, expected, OUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize('together', [1, 3, ROWS])
def test_any_number_of_rows_at_a_time_equals_float64(
  monkeypatch: pytest.MonkeyPatch, one_device: Mesh, together: int
):
  scores = together * HEADS * QUERIES * KEYS
  monkeypatch.setitem(blockwise.SCORES, 'cpu', scores)
  arrays, stretches = draw(150, 300), draw_stretches(150, 300)
  found = differentiate_anew(*place(one_device, arrays, stretches))
  expected = differentiate_in_float64(*arrays, *stretches)
  assert_close(found, expected, OUT_TOLERANCE, GRADIENT_TOLERANCE)


def test_keys_that_other_rows_alone_see_are_not_read_with_one_row_at_a_time(
  monkeypatch: pytest.MonkeyPatch, one_device: Mesh
):
  monkeypatch.setitem(blockwise.SCORES, 'cpu', 1)
  # Row i sees the i-th block of keys, and its other keys are not numbers.
  own = KEYS * np.arange(ROWS, dtype='int32')[:, None]
  first = np.broadcast_to(own, (ROWS, QUERIES))
  stretches = first, first + KEYS - 1
  arrays = draw(QUERIES, ROWS * KEYS)
  expected = differentiate_in_float64(*arrays, *stretches)
  for x in arrays[1:3]:
    for row in range(ROWS):
      x[row, :, : KEYS * row] = np.nan
      x[row, :, KEYS * (row + 1) :] = np.nan
  found = differentiate_anew(*place(one_device, arrays, stretches))
  assert_close(found, expected, OUT_TOLERANCE, GRADIENT_TOLERANCE)


def test_bfloat16_gives_bfloat16_near_float64(one_device: Mesh):
  arrays = [x.astype('bfloat16') for x in draw(300, 300)]
  stretches = draw_stretches(300, 300)
  found = differentiate(*place(one_device, arrays, stretches))
  expected = differentiate_in_float64(*arrays, *stretches)
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == 'bfloat16'
    scale = np.abs(y).max()
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(x / scale, y / scale, atol=BFLOAT16_TOLERANCE)


def test_sums_of_bfloat16_are_float32(one_device: Mesh):
  # Terms of one sign in the first block and of the other in the second: a
  # sum that was rounded on its way would be off by as much as its result.
  tokens = 2 * KEYS
  q, k, v, cotangent = draw(tokens, tokens)
  sign = np.where(np.arange(tokens) < KEYS, 1, -1)[:, None]
  arrays = [0 * q, k, v + sign, cotangent + sign[:, None]]
  arrays = [x.astype('bfloat16') for x in arrays]
  first = np.zeros((ROWS, tokens), 'int32')
  stretches = (first, first + tokens - 1)
  found = differentiate(*place(one_device, arrays, stretches))
  expected = differentiate_in_float64(*arrays, *stretches)
  # All weights are 1/512, exact in bfloat16: the result alone is rounded.
  for i in (0, 3):
    x = np.asarray(found[i], np.float64)
    np.testing.assert_allclose(x, expected[i], rtol=2**-8, atol=1e-6)
