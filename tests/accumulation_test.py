"""Tests that sums over chunks are in float32, whatever is summed."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from grit_jax import losses, objective, sharding
from grit_jax.batch import Batch, GenerativeRows
from grit_jax.config import Config, DataConfig, MemoryConfig, ObjectiveConfig
from grit_jax.data.pipeline import place_batch
from grit_jax.models import presets

# Of bfloat16's products, once; a sum in bfloat16 has ten times as much after
# 128 chunks.
HEAD_TOLERANCE = 3e-3
# A chunk's gradient is rounded to the weights' bfloat16, at random; a sum in
# bfloat16 loses what is smaller than half its last bit, all in one direction.
CHUNK_TOLERANCE = 3e-3


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
  found = np.asarray(found, np.float64)
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize('together', [2048, 16])
def test_a_bfloat16_head_has_the_float64_gradient_in_any_number_of_chunks(
  one_device: Mesh, monkeypatch: pytest.MonkeyPatch, together: int
):
  monkeypatch.setitem(losses.LOGIT_TOKENS, 'cpu', together)
  count, width, vocab = 2048, 16, 128
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((1, count, width)).astype(jnp.bfloat16)
  head = (0.1 * rng.standard_normal((width, vocab))).astype(jnp.bfloat16)
  # Frequent tokens, whose gradients add up in one direction.
  frequency = 1 / np.arange(1, vocab + 1)
  targets = rng.choice(vocab, (1, count), p=frequency / frequency.sum())

  exact, weight = (np.asarray(x, np.float64) for x in (hidden[0], head))
  of_logits = np.exp(exact @ weight)
  of_logits /= of_logits.sum(axis=1, keepdims=True)
  of_logits[np.arange(count), targets[0]] -= 1
  expected = exact.T @ of_logits

  rows = ('rows', 'seq')
  hidden = sharding.place(one_device, hidden, *rows, 'embed')
  targets = sharding.place(one_device, targets.astype(np.int32), *rows)
  ones = sharding.place(one_device, np.ones((1, count), np.float32), *rows)

  def loss(head: jax.Array) -> jax.Array:
    head = sharding.gather(head, 'embed', 'vocab', dtype='bfloat16')
    return losses._sum_losses(vocab, hidden, head, targets, ones)

  stored = jax.NamedSharding(one_device, sharding.weight_spec('embed', 'vocab'))
  found = jax.jit(jax.grad(loss))(jax.device_put(head, stored))
  assert relative_error(found, expected) < HEAD_TOLERANCE


def test_cached_gradients_of_bfloat16_weights_are_summed_in_float32(
  one_device: Mesh, random_decoder: Callable, pack: Callable
):
  """Of 256 equal chunks: a sum in bfloat16 stops growing at some point."""
  chunks, length = 256, 8
  model = dataclasses.replace(
    presets.tiny(), num_layers=1, param_dtype='bfloat16'
  )
  config = Config(
    model=model,
    objective=ObjectiveConfig(mode='generative', generative_reduction='token'),
    data=DataConfig(paths='unused', row_length=length),
    memory=MemoryConfig(chunk_rows=1),
  )
  rows = pack('iittttt', length=length)
  weights = ((rows.positions > 1) * 1.0).astype(np.float32)

  def gradient(count: int):
    row = GenerativeRows(rows, weights, np.int32(count))
    batch = jax.tree.map(lambda x: np.stack([x] * count) if x.ndim else x, row)
    placed = place_batch(one_device, Batch(None, batch))
    decoder = random_decoder(one_device, model)
    return jax.jit(objective.cached_gradient, static_argnums=2)(
      decoder, placed, config
    )[0]

  # The mean over equal chunks is the gradient of one.
  for one, many in zip(
    jax.tree.leaves(gradient(1)), jax.tree.leaves(gradient(chunks)),
    strict=True,
  ):  # fmt: skip
    assert many.dtype == 'bfloat16'
    assert relative_error(many, np.asarray(one, np.float64)) < CHUNK_TOLERANCE
