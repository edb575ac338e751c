"""Tests of the two losses against float64 numpy."""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from grit_jax import losses
from grit_jax.aot.flops import count_flops
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


@jax.jit
def differentiate_contrast(queries, passages, scored) -> tuple:
  """The loss, the accuracy, and the gradients of both."""
  function = jax.value_and_grad(
    losses.contrastive_loss, argnums=(0, 1), has_aux=True
  )
  return function(queries, passages, scored, TEMPERATURE)


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
  (loss, _), gradients = differentiate_contrast(
    queries.astype('float32'), passages.astype('float32'), scored
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
  queries = np.eye(4, dtype='float32')
  passages = np.stack([queries, queries[::-1] * 0.5], axis=1)
  swapped = passages[[1, 0, 2, 3]]
  everything = np.ones((4, 8), bool)
  share = [
    differentiate_contrast(queries, x, everything)[0][1]
    for x in (passages, swapped, passages[:, ::-1])
  ]
  assert share == [1.0, 0.5, 0.0]
  # Each query with its own positive alone.
  own = np.repeat(np.eye(4, dtype=bool), 2, axis=1)
  own &= np.arange(8) % 2 == 0
  (loss, accuracy), _ = differentiate_contrast(queries, swapped, own)
  assert (loss, accuracy) == (0.0, 1.0)


def make_batch(pack: Callable, length: int) -> GenerativeRows:
  """Weights of every size on the answers, none on a segment's first token."""
  rows = pack('iitt|ittt', 'it|' + 't' * (length - 2), length=length)
  weights = np.random.default_rng(1).random(rows.tokens.shape)
  counted = (rows.segments > 0) & (rows.positions > 0) & ~rows.in_instruction
  weights = np.where(counted, weights, 0).astype(np.float32)
  return GenerativeRows(rows, weights, np.int32(0))


def on(mesh: Mesh, batch: GenerativeRows) -> GenerativeRows:
  """The batch, on the mesh."""
  return jax.tree.map(
    lambda x: place(mesh, x, *('rows', 'seq')[: x.ndim]), batch
  )


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
  monkeypatch.setitem(losses.LOGIT_TOKENS, 'cpu', 4)
  config = dataclasses.replace(presets.tiny(), tie_embeddings=tied)
  model = random_decoder(one_device, config)
  batch, hidden = make_batch(pack, length), draw_hidden(length)
  head = model.embed[...].T if tied else model.head[...]
  expected = predict(
    hidden.astype(np.float64), np.asarray(head, np.float64), batch
  )
  actual = jax.jit(losses.next_token_loss)(
    model,
    place(one_device, hidden, 'rows', 'seq', 'embed'),
    on(one_device, batch),
  )
  assert actual.dtype == 'float32'
  np.testing.assert_allclose(actual, expected, rtol=LOSS_TOLERANCE)


def test_next_token_loss_of_a_row_shorter_than_a_chunk(
  one_device: Mesh, random_decoder: Callable, pack: Callable
):
  assert losses.LOGIT_TOKENS['cpu'] > 20
  model = random_decoder(one_device)
  batch, hidden = make_batch(pack, 10), draw_hidden(10)
  expected = predict(
    hidden.astype(np.float64), np.asarray(model.head[...], np.float64), batch
  )
  actual = jax.jit(losses.next_token_loss)(
    model,
    place(one_device, hidden, 'rows', 'seq', 'embed'),
    on(one_device, batch),
  )
  np.testing.assert_allclose(actual, expected, rtol=LOSS_TOLERANCE)


def dense_loss(
  model: Decoder, hidden: jax.Array, batch: GenerativeRows
) -> jax.Array:
  """Equation 2 by optax, over whole logits."""
  logits = model.logits(hidden, model.gather_head())[:, :-1]
  each = optax.softmax_cross_entropy(
    logits, jax.nn.one_hot(batch.rows.tokens[:, 1:], logits.shape[-1])
  )
  return (each * batch.loss_weights[:, 1:]).sum()


@pytest.mark.parametrize('tied', [False, True], ids=['untied', 'tied'])
@pytest.mark.parametrize('length', [12, 11])
def test_the_gradient_is_that_of_optax_and_no_logits_are_whole(
  one_device: Mesh,
  random_decoder: Callable,
  pack: Callable,
  monkeypatch: pytest.MonkeyPatch,
  length: int,
  tied: bool,
):
  monkeypatch.setitem(losses.LOGIT_TOKENS, 'cpu', 4)
  config = dataclasses.replace(presets.tiny(), tie_embeddings=tied)
  model = random_decoder(one_device, config)
  batch = on(one_device, make_batch(pack, length))
  hidden = place(one_device, draw_hidden(length), 'rows', 'seq', 'embed')
  found, programs = [], []
  for loss in (losses.next_token_loss, dense_loss):
    # A factor, as the joint loss has one.
    program = jax.jit(
      jax.value_and_grad(
        lambda model, hidden, loss=loss: 3 * loss(model, hidden, batch),
        argnums=(0, 1),
      )
    )
    programs.append(program.lower(model, hidden).compile())
    found.append(programs[-1](model, hidden))
  actual, expected = found
  np.testing.assert_allclose(actual[0], expected[0], rtol=LOSS_TOLERANCE)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected[1]))
  assert largest > 0.1
  jax.tree.map(
    lambda actual, expected: np.testing.assert_allclose(
      actual, expected, atol=GRADIENT_TOLERANCE * largest
    ),
    actual[1],
    expected[1],
  )
  # Besides the head, the largest are the logits of a chunk.
  sizes, whole = (
    find_sizes(program) - {config.embed_dim * 256} for program in programs
  )
  assert max(whole) >= 2 * (length - 1) * 256
  assert max(sizes) == 4 * 256


def find_sizes(program: jax.stages.Compiled) -> set[int]:
  """The sizes of a compiled program's arrays with a vocabulary axis."""
  shapes = re.findall(r'\b(?:f32|pred|s32)\[([\d,]+)\]', program.as_text())
  sizes = [tuple(map(int, shape.split(','))) for shape in set(shapes)]
  return {math.prod(shape) for shape in sizes if 256 in shape}


def test_tokens_that_do_not_count_are_not_scored(
  one_device: Mesh,
  random_decoder: Callable,
  pack: Callable,
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.setitem(losses.LOGIT_TOKENS, 'cpu', 4)
  model = random_decoder(one_device)
  batch, hidden = make_batch(pack, 12), draw_hidden(12)
  rows, columns = np.nonzero(batch.loss_weights)
  # Two chunks of those that count; all other states would spoil the sums.
  weights = batch.loss_weights.copy()
  weights[rows[8:], columns[8:]] = 0
  batch = dataclasses.replace(batch, loss_weights=weights)
  counted = np.zeros(weights.shape, bool)
  counted[rows[:8], columns[:8] - 1] = True
  expected = predict(
    hidden.astype(np.float64), np.asarray(model.head[...], np.float64), batch
  )
  hidden[~counted] = np.nan
  total, gradient = jax.jit(
    jax.value_and_grad(losses.next_token_loss, argnums=1)
  )(
    model,
    place(one_device, hidden, 'rows', 'seq', 'embed'),
    on(one_device, batch),
  )
  np.testing.assert_allclose(total, expected, rtol=LOSS_TOLERANCE)
  np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), counted)


def test_nothing_is_computed_twice_and_no_gradient_of_a_frozen_head(
  one_device: Mesh, random_decoder: Callable, pack: Callable
):
  model = random_decoder(one_device)
  batch = on(one_device, make_batch(pack, 12))
  hidden = place(one_device, draw_hidden(12), 'rows', 'seq', 'embed')
  forward, by_hidden, by_both = (
    count_flops(
      jax.make_jaxpr(function)(model, hidden, batch).jaxpr, one_device.size
    )
    for function in (
      losses.next_token_loss,
      jax.grad(losses.next_token_loss, argnums=1),
      jax.grad(losses.next_token_loss, argnums=(0, 1)),
    )
  )
  assert forward == 2 * 24 * model.config.embed_dim * 256
  assert (by_hidden, by_both) == (2 * forward, 3 * forward)
