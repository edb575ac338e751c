"""Tests of the choice of tokens, against transformers and probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.inference import sampling
from grit_jax.inference.sampling import Sampling

# 20,000 draws: three standard deviations of a share of 1/2 are 0.011.
SHARE_TOLERANCE = 0.012


def draw_logits(rows: int, size: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return (3 * rng.standard_normal((rows, size))).astype('float32')


keep_likely = jax.jit(sampling.keep_likely)


@jax.jit
def choose_by_seeds(
  logits: jax.Array, seeds: jax.Array, *settings: jax.Array
) -> jax.Array:
  """Chooses each row's first token; settings in the order of `choose`."""
  keys = jax.vmap(jax.random.key)(seeds)
  return sampling.choose(
    logits, keys, jnp.zeros_like(seeds, jnp.int32), *settings
  )


@pytest.mark.parametrize(
  ('top_k', 'top_p'), [(0, 0.5), (5, 1.0), (7, 0.9), (1, 0.3), (0, 1e-6)]
)
def test_likely_tokens_are_those_of_transformers(top_k: int, top_p: float):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  logits = draw_logits(6, 50)
  expected = torch.tensor(logits)
  if top_k:
    expected = transformers.TopKLogitsWarper(top_k)(None, expected)
  if top_p < 1:
    expected = transformers.TopPLogitsWarper(top_p)(None, expected)
  kept = keep_likely(
    logits, np.full(6, top_k, np.int32), np.full(6, top_p, np.float32)
  )
  np.testing.assert_array_equal(kept, expected.numpy())


def test_each_row_has_its_own_settings():
  logits = draw_logits(6, 50)
  top_k, top_p = np.zeros(6, np.int32), np.ones(6, np.float32)
  top_k[1], top_p[2] = 3, 1e-6
  kept = keep_likely(logits, top_k, top_p)
  assert np.isfinite(kept).sum(axis=1).tolist() == [50, 3, 1, 50, 50, 50]


def choose(logits: np.ndarray, seeds: np.ndarray, **settings: float):
  rows = len(logits)
  columns = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0} | settings
  return choose_by_seeds(
    logits,
    seeds.astype(np.uint32),
    np.full(rows, columns['temperature'], np.float32),
    np.full(rows, columns['top_k'], np.int32),
    np.full(rows, columns['top_p'], np.float32),
  )


def test_draws_have_the_probabilities_of_the_softmax_at_the_temperature():
  logits = np.array([0.0, 1.0, 2.0], np.float32)
  draws = 20_000
  tokens = choose(
    np.tile(logits, (draws, 1)), np.arange(draws), temperature=0.7
  )
  shares = np.bincount(tokens, minlength=3) / draws
  weights = np.exp(logits / 0.7)
  np.testing.assert_allclose(
    shares, weights / weights.sum(), atol=SHARE_TOLERANCE
  )


def test_without_a_temperature_the_best_token_is_chosen():
  logits = draw_logits(6, 50)
  tokens = choose(logits, np.arange(6), temperature=0.0)
  np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_nothing_unlikely_is_ever_drawn():
  logits = np.tile(draw_logits(1, 50), (500, 1))
  tokens = choose(logits, np.arange(500), top_k=4)
  best = np.argsort(-logits[0])[:4]
  assert set(np.unique(tokens)) == set(best)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('max_new_tokens', 0),
    ('temperature', -0.1),
    ('temperature', float('nan')),
    ('top_k', -1),
    ('top_p', 0.0),
    ('top_p', 1.5),
    ('seed', -1),
    ('stop', ('',)),
  ],
)
def test_a_setting_that_cannot_be_is_named(name: str, value: object):
  with pytest.raises(ValueError, match=name):
    Sampling(**{name: value}).validate()
