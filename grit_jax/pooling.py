"""From hidden states to one embedding a text."""

import jax
import jax.numpy as jnp

from grit_jax.batch import Rows


def token_weights(rows: Rows, pooling: str) -> jax.Array:
  """Returns each token's weight in its text's pooled state.

  Args:
    rows: texts, of which the tokens are pooled that are not instruction.
    pooling: `mean`: all alike. `weightedmean`: 1, 2, 3, ... along the text
      (SGPT, arXiv 2202.08904, eq. 3). `cls`: the first token of the prompt.
      `lasttoken`: the last token of the text.

  Returns:
    float32 [R, T], not normalised; 0 on padding.
  """
  pooled = (rows.segments > 0) & ~rows.in_instruction
  if pooling == 'mean':
    weights = pooled
  elif pooling == 'weightedmean':
    # The count of pooled tokens so far in the row, less those before this
    # segment; that count never falls, so a running maximum carries it along.
    count = jnp.cumsum(pooled, axis=1)
    at_start = jnp.where(rows.positions == 0, count - pooled, 0)
    weights = pooled * (count - jax.lax.cummax(at_start, axis=1))
  elif pooling == 'cls':
    weights = (rows.positions == 0) & (rows.segments > 0)
  else:
    following = jnp.pad(rows.segments, ((0, 0), (0, 1)))[:, 1:]
    weights = pooled & (following != rows.segments)
  return weights.astype(jnp.float32)


def pool(
  hidden: jax.Array, rows: Rows, pooling: str, max_segments: int
) -> jax.Array:
  """Averages the hidden states of each segment by `token_weights`.

  In float32: a temperature of 0.02 multiplies what bfloat16 would round off
  by 50.

  Args:
    hidden: [R, T, D].
    rows: the texts.
    pooling: see `token_weights`.
    max_segments: M, segments a row at most.

  Returns:
    float32 [R, M, D]; 0 for a segment that the row does not have.
  """
  weights = token_weights(rows, pooling)
  segment = jnp.arange(1, max_segments + 1)
  selected = jnp.where(
    rows.segments[:, :, None] == segment, weights[:, :, None], 0.0
  )
  total = selected.sum(axis=1)[:, :, None]
  pooled = jnp.einsum(
    'btm,btd->bmd',
    selected,
    hidden.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return pooled / jnp.where(total > 0, total, 1.0)


def normalise(x: jax.Array) -> jax.Array:
  """Scales vectors [..., D] to length 1; a zero vector stays zero."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
