"""Tests of the two losses against float64 numpy."""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from grit_jax import losses
from grit_jax.batch import GenerativeRows
from grit_jax.models import presets
from grit_jax.models.decoder import Decoder
from grit_jax.sharding import place

# Float32 scores, 1/t = 50 times as large, against float64: 50 * 2^-24 = 3e-6.
LOSS_TOLERANCE = 1e-5
# The same for the gradient, relative to its largest entry.
GRADIENT_TOLERANCE = 1e-5
# Of central differences in float64, whose error is their square over t^3.
STEP = 1e-6

TEMPERATURE = 0.02
VOCAB = presets.tiny().vocab_size


def contrast(
  queries: np.ndarray, passages: np.ndarray, scored: np.ndarray
) -> float:
  """Equation 1 in numpy: the positive of query q is passage (q, 0)."""
  total = 0.0
  for q, query in enumerate(queries):
    compared = passages.reshape(-1, passages.shape[-1])[scored[q]]
    scores = compared @ query / TEMPERATURE
    own = passages[q, 0] @ query / TEMPERATURE
    total -= own - scores.max() - np.log(np.exp(scores - scores.max()).sum())
  return total / len(queries)


def draw_embeddings(group: int) -> tuple[np.ndarray, np.ndarray]:
  """Vectors of length 1, close enough that no probability is 0 or 1."""
  rng = np.random.default_rng(0)
  base = rng.standard_normal(6)
  queries = base + 0.2 * rng.standard_normal((4, 6))
  passages = base + 0.2 * rng.standard_normal((4, group, 6))
  return tuple(
    x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, passages)
  )


def draw_scored(group: int) -> np.ndarray:
  """Half of the passages, the queries' own positives among them."""
  scored = np.random.default_rng(1).random((4, 4 * group)) < 0.5
  scored[np.arange(4), np.arange(4) * group] = True
  return scored


@pytest.mark.parametrize(
  ('group', 'masked'), [(1, False), (3, False), (3, True)]
)
def test_contrastive_loss_and_gradient_equal_float64(group: int, masked: bool):
  queries, passages = draw_embeddings(group)
  scored = draw_scored(group) if masked else np.ones((4, 4 * group), bool)
  (loss, _), gradients = jax.value_and_grad(
    losses.contrastive_loss, argnums=(0, 1), has_aux=True
  )(
    jnp.asarray(queries, 'float32'),
    jnp.asarray(passages, 'float32'),
    scored,
    TEMPERATURE,
  )
  np.testing.assert_allclose(
    loss, contrast(queries, passages, scored), rtol=LOSS_TOLERANCE
  )
  arrays = (queries, passages)
  for x, gradient in zip(arrays, gradients, strict=True):
    expected = np.empty_like(x)
    for index in np.ndindex(x.shape):
      value, ends = x[index], []
      for step in (STEP, -STEP):
        x[index] = value + step
        ends.append(contrast(*arrays, scored))
      x[index] = value
      expected[index] = (ends[0] - ends[1]) / (2 * STEP)
    np.testing.assert_allclose(
      gradient, expected, atol=GRADIENT_TOLERANCE * np.abs(expected).max()
    )


def test_contrastive_accuracy_counts_positives_that_score_highest():
  queries = jnp.eye(4)
  passages = jnp.stack([jnp.eye(4), jnp.eye(4)[::-1] * 0.5], axis=1)
  swapped = passages.at[0].set(passages[1]).at[1].set(passages[0])
  everything = jnp.ones((4, 8), bool)
  share = [
    losses.contrastive_loss(queries, x, everything, TEMPERATURE)[1]
    for x in (passages, swapped, passages[:, ::-1])
  ]
  assert share == [1.0, 0.5, 0.0]
  # Each query with its own positive alone.
  own = jnp.repeat(jnp.eye(4, dtype=bool), 2, axis=1)
  own &= jnp.arange(8) % 2 == 0
  loss, accuracy = losses.contrastive_loss(queries, swapped, own, TEMPERATURE)
  assert (loss, accuracy) == (0.0, 1.0)


def make_batch(pack: Callable, length: int) -> GenerativeRows:
  """Weights of every size on the answers, none on a segment's first token."""
  rows = pack('iitt|ittt', 'it|' + 't' * (length - 2), length=length)
  weights = np.random.default_rng(1).random(rows.tokens.shape)
  counted = (rows.segments > 0) & (rows.positions > 0) & ~rows.in_instruction
  weights = np.where(counted, weights, 0).astype(np.float32)
  return GenerativeRows(rows, weights, np.int32(0))


def predict(
  hidden: np.ndarray, head: np.ndarray, batch: GenerativeRows
) -> float:
  """Equation 2 in numpy, a token at a time."""
  total = 0.0
  for row, t in np.argwhere(batch.loss_weights > 0):
    scores = hidden[row, t - 1] @ head[:, :VOCAB]
    token = batch.rows.tokens[row, t]
    log_probability = scores[token] - np.log(np.exp(scores).sum())
    total -= batch.loss_weights[row, t] * log_probability
  return total


def draw_hidden(length: int) -> np.ndarray:
  """Hidden states of two rows."""
  shape = (2, length, presets.tiny().embed_dim)
  return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('tied', [False, True], ids=['untied', 'tied'])
@pytest.mark.parametrize('length', [12, 10, 3 + 8])
def test_next_token_loss_equals_float64(
  one_device: Mesh,
  random_decoder: Callable,
  pack: Callable,
  monkeypatch: pytest.MonkeyPatch,
  length: int,
  tied: bool,
):
  monkeypatch.setattr(losses, 'LOGIT_POSITIONS', 4)
  config = dataclasses.replace(presets.tiny(), tie_embeddings=tied)
  model = random_decoder(one_device, config)
  batch, hidden = make_batch(pack, length), draw_hidden(length)
  head = model.embed[...].T if tied else model.head[...]
  expected = predict(
    hidden.astype(np.float64), np.asarray(head, np.float64), batch
  )
  actual = losses.next_token_loss(model, jnp.asarray(hidden), batch)
  assert actual.dtype == 'float32'
  np.testing.assert_allclose(actual, expected, rtol=LOSS_TOLERANCE)


def test_next_token_loss_of_a_row_shorter_than_a_chunk(
  one_device: Mesh, random_decoder: Callable, pack: Callable
):
  assert losses.LOGIT_POSITIONS > 10
  model = random_decoder(one_device)
  batch, hidden = make_batch(pack, 10), draw_hidden(10)
  expected = predict(
    hidden.astype(np.float64), np.asarray(model.head[...], np.float64), batch
  )
  actual = losses.next_token_loss(model, jnp.asarray(hidden), batch)
  np.testing.assert_allclose(actual, expected, rtol=LOSS_TOLERANCE)


@pytest.mark.parametrize('tied', [False, True], ids=['untied', 'tied'])
def test_chunks_change_no_gradient_and_hold_no_whole_logits(
  one_device: Mesh,
  random_decoder: Callable,
  pack: Callable,
  monkeypatch: pytest.MonkeyPatch,
  tied: bool,
):
  length = 10
  config = dataclasses.replace(presets.tiny(), tie_embeddings=tied)
  model = random_decoder(one_device, config)
  batch = jax.tree.map(jnp.asarray, make_batch(pack, length))
  hidden = place(one_device, draw_hidden(length), 'rows', 'seq', 'embed')
  programs = {}
  for positions in (length, 4):
    monkeypatch.setattr(losses, 'LOGIT_POSITIONS', positions)

    def loss(model: Decoder, hidden: jax.Array) -> jax.Array:
      return losses.next_token_loss(model, hidden, batch)

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    programs[positions] = program.lower(model, hidden).compile()
  # [2, 10, 256] is in the one program and in no shape in the other, where the
  # largest besides the head are the logits of a chunk.
  assert 2 * length * 256 in find_sizes(programs[length])
  sizes = find_sizes(programs[4]) - {config.embed_dim * 256}
  assert max(sizes) == 2 * 4 * 256
  whole, chunked = (programs[n](model, hidden) for n in (length, 4))
  np.testing.assert_allclose(chunked[0], whole[0], rtol=LOSS_TOLERANCE)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(whole[1]))
  assert largest > 0.1
  jax.tree.map(
    lambda actual, expected: np.testing.assert_allclose(
      actual, expected, atol=GRADIENT_TOLERANCE * largest
    ),
    chunked[1],
    whole[1],
  )


def find_sizes(program: jax.stages.Compiled) -> set[int]:
  """The sizes of a compiled program's arrays with a vocabulary axis."""
  shapes = re.findall(r'\b(?:f32|pred|s32)\[([\d,]+)\]', program.as_text())
  sizes = [tuple(map(int, shape.split(','))) for shape in set(shapes)]
  return {math.prod(shape) for shape in sizes if 256 in shape}
