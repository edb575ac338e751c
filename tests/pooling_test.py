"""Tests of pooling, text by text, against the published definitions."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from grit_jax.config import POOLINGS
from grit_jax.models import presets
from grit_jax.pooling import normalise, pool, token_weights

# Float32 averages of at most ten numbers of size 1.
MEAN_TOLERANCE = 1e-6
# Float32 sums of 32 products of numbers of size 1, in another order.
SUM_TOLERANCE = 1e-5

LENGTH, WIDTH, MAX_SEGMENTS = 12, 5, 4
LAYOUTS = (
  'itt|iitttt',  # padding behind
  'ttt|t|it|iittt',  # another row, without room
  'iitittt',  # instruction amid the text
  '',
)


pool_rows = jax.jit(pool, static_argnums=(2, 3))


def pool_text(hidden: np.ndarray, is_text: np.ndarray, pooling: str):
  """The pooled state of one prompt, [N, D], by gritlm's formulas."""
  if pooling == 'cls':
    return hidden[0]
  if pooling == 'lasttoken':
    return hidden[-1]
  text = hidden[is_text]
  if pooling == 'mean':
    return text.sum(axis=0) / len(text)
  weights = np.arange(1, len(text) + 1)
  return weights @ text / weights.sum()


@pytest.mark.parametrize('pooling', POOLINGS)
def test_pool_equals_the_definition_text_by_text(pack: Callable, pooling: str):
  rows = pack(*LAYOUTS, length=LENGTH)
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((len(LAYOUTS), LENGTH, WIDTH))
  actual = pool_rows(hidden.astype('float32'), rows, pooling, MAX_SEGMENTS)
  expected = np.zeros((len(LAYOUTS), MAX_SEGMENTS, WIDTH))
  for row, layout in enumerate(LAYOUTS):
    start = 0
    for segment, letters in enumerate(filter(None, layout.split('|'))):
      is_text = np.array([letter == 't' for letter in letters])
      part = hidden[row, start : start + len(letters)]
      expected[row, segment] = pool_text(part, is_text, pooling)
      start += len(letters)
  np.testing.assert_allclose(actual, expected, atol=MEAN_TOLERANCE)


@pytest.mark.parametrize('pooling', POOLINGS)
def test_a_segment_that_a_row_lacks_is_zero(pack: Callable, pooling: str):
  rows = pack('itt|tt', '', '', '', length=LENGTH)
  hidden = np.ones((4, LENGTH, WIDTH), 'float32')
  pooled = np.asarray(pool_rows(hidden, rows, pooling, MAX_SEGMENTS))
  filled = np.zeros((4, MAX_SEGMENTS), bool)
  filled[0, :2] = True
  np.testing.assert_array_equal(pooled == 0, ~np.repeat(
    filled[:, :, None], WIDTH, axis=2
  ))  # fmt: skip


@pytest.mark.parametrize('pooling', POOLINGS)
def test_padding_has_no_weight(pack: Callable, pooling: str):
  rows = pack(*LAYOUTS, length=LENGTH)
  weigh = jax.jit(token_weights, static_argnums=1)
  weights = np.asarray(weigh(rows, pooling))
  assert weights.dtype == np.float32
  assert not weights[rows.segments == 0].any()
  if pooling != 'cls':
    assert not weights[rows.in_instruction].any()


def test_pooling_is_in_float32_for_bfloat16_states(pack: Callable):
  # 256 + 1 is no bfloat16, and half of it neither.
  rows = pack('tt', length=2)
  hidden = jnp.asarray([[[256.0], [1.0]]], 'bfloat16')
  pooled = pool_rows(hidden, rows, 'mean', 1)
  assert pooled.dtype == 'float32'
  assert pooled[0, 0, 0] == 128.5


@pytest.mark.parametrize('pooling', POOLINGS)
def test_projecting_after_pooling_equals_projecting_each_token_before(
  one_device: Mesh, random_decoder: Callable, pack: Callable, pooling: str
):
  config = dataclasses.replace(presets.tiny(), projection_dim=7)
  model = random_decoder(one_device, config)
  rows = pack('iitt|ttt', 'itt', length=LENGTH)
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((2, LENGTH, config.embed_dim))
  weight = np.asarray(model.projection[...], np.float64)
  bias = np.asarray(model.projection_bias[...], np.float64)
  assert bias.all()
  projected = (hidden @ weight + bias).astype('float32')
  before = pool_rows(projected, rows, pooling, 2)
  after = model.project(pool_rows(hidden.astype('float32'), rows, pooling, 2))
  there = np.array([[True, True], [True, False]])
  np.testing.assert_allclose(
    np.asarray(after)[there], np.asarray(before)[there], atol=SUM_TOLERANCE
  )


def test_without_a_projection_pooled_states_stay_as_they_are(
  one_device: Mesh, random_decoder: Callable
):
  pooled = jnp.ones((1, 2, 32))
  assert random_decoder(one_device).project(pooled) is pooled


def test_normalise_scales_to_length_one_and_leaves_zero_alone():
  x = np.random.default_rng(0).standard_normal((4, 6)) * 1e3
  x[2] = 0
  lengths = np.linalg.norm(normalise(jnp.asarray(x, 'float32')), axis=-1)
  np.testing.assert_allclose(lengths, [1, 1, 0, 1], atol=MEAN_TOLERANCE)
  gradient = jax.grad(lambda x: normalise(x).sum())(jnp.zeros((3,)))
  assert np.isfinite(gradient).all()
