"""Attention in blocks: exact, in plain operations, without the whole scores.

Every attention mode of the package lets a token see one stretch of positions:
from the start of its text, or of its window, to itself, to the end of its text
or to the end of its instruction. So a mask is two numbers a token, and a block
of queries needs no keys before the least or after the greatest of them: its
blocks of keys begin where the first key lies that it sees. Scores exist for a
block of queries and a block of keys (Milakov and Gimelshein 2018, arXiv
1805.02867; Dao et al. 2022, arXiv 2205.14135), forward and backward. On a CPU
they exist for few rows at a time too.

The keys may be longer than the queries: a cache, of which only the part in use
is read.

Letters: see `grit_jax.models.decoder`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grit_jax.sharding import platform, spec

# Positions a block. The keys that short texts see who share a block of queries
# are mostly one block. On a CPU a product with 128 keys runs at half the speed
# of one with 256.
QUERIES, KEYS = 128, 256

# Scores that exist at a time, by platform: on a CPU 2 MB, which stay in its
# cache, or those of one row. Rows that are computed together go through the
# keys that any of them sees. Other platforms want large products: all rows.
SCORES = {'cpu': 2**19}

# The name of what a gradient needs of the forward pass.
KEPT = 'attended'


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array
) -> jax.Array:
  """Grouped-query attention, each device its rows and heads.

  Args:
    q: [B, T, N, H], scaled; a query head n reads key-value head n // G.
    k: [B, K, S, H].
    v: [B, K, S, H].
    first: int32 [B, T], the first key that each query sees.
    last: int32 [B, T], the last one; where it is before `first` the query
      sees nothing, and its result is 0.

  Returns:
    [B, T, N, H], in the dtype of `q`.
  """
  queries = spec('rows', 'seq', 'heads', 'head_dim')
  keys = spec('rows', 'kv_heads', 'seq', 'head_dim')
  rows = spec('rows', 'seq')
  first, last = (jax.sharding.reshard(x, rows) for x in (first, last))
  return jax.shard_map(
    partial(_attend_rows, most_scores=SCORES.get(platform())),
    in_specs=(queries, keys, keys, rows, rows),
    out_specs=queries,
    # How many blocks there are differs from device to device.
    check_vma=False,
  )(q, k, v, first, last)


def _attend_rows(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  first: jax.Array,
  last: jax.Array,
  most_scores: int | None,
) -> jax.Array:
  """`attend` on one device: pads, groups the heads, and cuts the queries."""
  rows, tokens, heads, head_dim = q.shape
  kv_heads = k.shape[1]
  group = heads // kv_heads
  size = min(QUERIES, tokens)
  extra = -tokens % size
  together = rows
  if most_scores is not None:
    fit = most_scores // (heads * size * min(KEYS, k.shape[2]))
    together = max(n for n in range(1, max(fit, 1) + 1) if rows % n == 0)
  q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
  first = jnp.pad(first, ((0, 0), (0, extra)), constant_values=k.shape[2])
  last = jnp.pad(last, ((0, 0), (0, extra)), constant_values=-1)
  # The query heads of a key-value head become one list of positions, so that
  # a block is one matrix product a row and key-value head.
  parts = rows // together, together, (tokens + extra) // size
  q = q.reshape(*parts, size, kv_heads, group, head_dim)
  q = q.transpose(0, 2, 1, 4, 5, 3, 6)
  q = q.reshape(-1, together, kv_heads, group * size, head_dim)
  first, last = (
    jnp.swapaxes(x.reshape(*parts, size), 1, 2).reshape(-1, together, size)
    for x in (first, last)
  )
  row = jnp.repeat(jnp.arange(0, rows, together), parts[2])
  out = _attend_blocks(q, k, v, _Queries(row, first, last))
  out = out.reshape(
    parts[0], parts[2], together, kv_heads, group, size, head_dim
  )
  out = out.transpose(0, 2, 1, 5, 3, 4, 6)
  return out.reshape(rows, -1, heads, head_dim)[:, :tokens]


class _Queries(NamedTuple):
  """What blocks of queries see: of `b` rows, `size` queries each."""

  row: jax.Array  # int32 [blocks], the first of the rows.
  first: jax.Array  # int32 [blocks, b, size]
  last: jax.Array  # int32 [blocks, b, size]


@jax.custom_vjp
def _attend_blocks(
  q: jax.Array, k: jax.Array, v: jax.Array, sees: _Queries
) -> jax.Array:
  """Attends block by block.

  Args:
    q: [blocks, b, K, G * size, H].
    k: [B, K, S, H].
    v: [B, K, S, H].
    sees: of each block.

  Returns:
    As `q`.
  """
  return _forward(q, k, v, sees)[0]


class _Keys(NamedTuple):
  """A block of keys, for one of queries."""

  sees: _Queries
  # Its first place; the last block ends where the keys end, and so may begin
  # among those of the block before it, which are not its own.
  start: jax.Array
  own: jax.Array  # The first place that is its own.
  size: int

  def take(self, x: jax.Array) -> jax.Array:
    """Returns the block's part of [B, K, S, H], [b, K, size, H]."""
    sizes = self.sees.first.shape[0], x.shape[1], self.size, x.shape[3]
    return jax.lax.dynamic_slice(x, self._corner(), sizes)

  def add_to(self, x: jax.Array, block: jax.Array) -> jax.Array:
    """Adds the block's part to [B, K, S, H]."""
    block = self.take(x) + block
    return jax.lax.dynamic_update_slice(x, block, self._corner())

  def _corner(self) -> tuple:
    return self.sees.row, 0, self.start, 0

  def mask(self, group: int) -> jax.Array:
    """Returns who sees which of its keys, bool [b, 1, G * queries, size]."""
    places = self.start + jnp.arange(self.size)
    first = jnp.maximum(self.sees.first, self.own)
    seen = (first[..., None] <= places) & (places <= self.sees.last[..., None])
    return jnp.tile(seen, (1, group, 1))[:, None]


def _loop_over_keys(
  add: Callable[[_Keys, tuple], tuple], carry: tuple, keys: int, sees: _Queries
) -> tuple:
  """Goes through the blocks of `keys` keys that a block of queries sees."""
  size = min(KEYS, keys)
  any_seen = sees.first <= sees.last
  start = jnp.where(any_seen, sees.first, keys).min()
  stop = jnp.where(any_seen, sees.last, -1).max() + 1
  blocks = (jnp.maximum(stop - start, 0) + size - 1) // size

  def step(number: jax.Array, carry: tuple) -> tuple:
    own = start + number * size
    return add(_Keys(sees, jnp.minimum(own, keys - size), own, size), carry)

  return jax.lax.fori_loop(0, blocks, step, carry)


def _score(q: jax.Array, k: jax.Array) -> jax.Array:
  """Scores in float32: a softmax over thousands of keys needs it."""
  return jnp.einsum('bkth,bksh->bkts', q, k, preferred_element_type=jnp.float32)


def _sum_values(weights: jax.Array, v: jax.Array) -> jax.Array:
  return jnp.einsum(
    'bkts,bksh->bkth', weights.astype(v.dtype), v,
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, sees: _Queries
) -> tuple[jax.Array, jax.Array]:
  """Returns the result, and the logarithm of each softmax's denominator."""
  group = q.shape[3] // sees.first.shape[2]

  def attend_block(_: None, block: tuple) -> tuple[None, tuple]:
    q, sees = block

    def add(keys: _Keys, carry: tuple) -> tuple:
      greatest, total, out = carry
      scores = _score(q, keys.take(k))
      scores = jnp.where(keys.mask(group), scores, -jnp.inf)
      # Finite also where nothing has been seen yet: -inf less -inf is NaN.
      new = jnp.maximum(greatest, scores.max(axis=-1, keepdims=True))
      weights = jnp.exp(scores - new)
      kept = jnp.exp(greatest - new)
      total = kept * total + weights.sum(axis=-1, keepdims=True)
      return new, total, kept * out + _sum_values(weights, keys.take(v))

    least = jnp.full((*q.shape[:3], 1), jnp.finfo(jnp.float32).min)
    zero = jnp.zeros_like(least)
    carry = least, zero, jnp.zeros(q.shape, jnp.float32)
    greatest, total, out = _loop_over_keys(add, carry, k.shape[2], sees)
    total = jnp.where(total > 0, total, 1.0)
    return None, ((out / total).astype(q.dtype), greatest + jnp.log(total))

  _, (out, normaliser) = jax.lax.scan(attend_block, None, (q, sees))
  return out, normaliser


def _forward_to_keep(
  q: jax.Array, k: jax.Array, v: jax.Array, sees: _Queries
) -> tuple[jax.Array, tuple]:
  out, normaliser = checkpoint_name(_forward(q, k, v, sees), KEPT)
  return out, (q, k, v, sees, out, normaliser)


def _backward(kept: tuple, out_gradient: jax.Array) -> tuple:
  q, k, v, sees, out, normaliser = kept
  group = q.shape[3] // sees.first.shape[2]
  # Each softmax's gradient has the weighted mean of the values' taken off. In
  # the loop over blocks it would be computed for each block of keys.
  mean = (out.astype(jnp.float32) * out_gradient.astype(jnp.float32)).sum(
    axis=-1, keepdims=True
  )

  def add_block(sums: tuple, block: tuple) -> tuple[tuple, jax.Array]:
    q, sees, mean, normaliser, out_gradient = block

    def add(keys: _Keys, carry: tuple) -> tuple:
      q_sum, k_sum, v_sum = carry
      k_block = keys.take(k)
      weights = jnp.exp(_score(q, k_block) - normaliser)
      weights = jnp.where(keys.mask(group), weights, 0.0)
      by_weight = _score(out_gradient, keys.take(v))
      by_score = (weights * (by_weight - mean)).astype(q.dtype)
      weights = weights.astype(q.dtype)
      return (
        q_sum + _sum_values(by_score, k_block),
        keys.add_to(k_sum, _sum_queries(by_score, q)),
        keys.add_to(v_sum, _sum_queries(weights, out_gradient)),
      )

    carry = jnp.zeros(q.shape, jnp.float32), *sums
    q_sum, k_sum, v_sum = _loop_over_keys(add, carry, k.shape[2], sees)
    return (k_sum, v_sum), q_sum.astype(q.dtype)

  zeros = jnp.zeros(k.shape, jnp.float32)
  (k_sum, v_sum), q_sum = jax.lax.scan(
    add_block, (zeros, zeros), (q, sees, mean, normaliser, out_gradient)
  )
  return q_sum, k_sum.astype(k.dtype), v_sum.astype(v.dtype), None


def _sum_queries(weights: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.einsum(
    'bkts,bkth->bksh', weights, x, preferred_element_type=jnp.float32
  )


_attend_blocks.defvjp(_forward_to_keep, _backward)
