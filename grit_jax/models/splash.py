"""Splash attention: a flash kernel that computes only the blocks in a band.

The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`, forward and
backward; neither has scores of more than a block in memory. Rows may have any
length (they are padded to whole lanes) and heads any size: those of 16 to 256
compile for v5e and v6e; one that is no multiple of 128 leaves lanes empty. On a
CPU the same program is interpreted.

What a token sees is described by three things, all of them exact:

- segment ids: a token sees its own segment alone;
- a static band: at most `left` positions before the token and `right` after
  it, None for all. Blocks outside it are not computed;
- where the band is wider than what is seen, `last`: the last position that
  each token sees. It is data, and stands where the kernel's masks keep the
  queries' positions.

Letters: see `grit_jax.models.decoder`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as mask_info,
)

from grit_jax.sharding import spec

# Rows are padded to a multiple of the lanes of a TPU's vector registers.
LANES = 128
# Positions a block, at most. Blocks of 2048 need more fast memory than most
# chips have; 512 fits all.
BLOCK = 512
# A token's position and its `last` share the bits of an int32.
_LAST_BITS = 16
MAX_WINDOWED_TOKENS = 2 ** (31 - _LAST_BITS)


class Band(NamedTuple):
  """How many positions before and after itself a token sees; None: all."""

  left: int | None
  right: int | None


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array,
  band: Band,
  last: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Grouped-query attention, each device its rows and heads.

  Args:
    q: [B, T, N, H], scaled; a query head n reads key-value head n // G.
    k: [B, T, K, H].
    v: [B, T, K, H].
    segments: int32 [B, T].
    band: what is seen at most.
    last: int32 [B, T], the last position that a token sees, its own or a later
      one; None: as the band says.
    interpret: run on a CPU.

  Returns:
    [B, T, N, H], in the dtype of `q`.
  """
  tokens = q.shape[1]
  windowed = last is not None and band.left is not None
  if windowed and tokens > MAX_WINDOWED_TOKENS:
    raise ValueError(
      f'Rows of {tokens} tokens: with a window, and attention that differs '
      f'within a text, splash takes {MAX_WINDOWED_TOKENS} at most.'
    )
  padding = -tokens % LANES
  local = partial(
    _attend_rows,
    make_kernel=_kernel(tokens + padding, band, last is not None, interpret),
    padding=padding,
    left=band.left,
  )
  rows = spec('rows', 'seq')
  queries = spec('rows', 'seq', 'heads', 'head_dim')
  keys = spec('rows', 'seq', 'kv_heads', 'head_dim')
  return jax.shard_map(
    local,
    in_specs=(queries, keys, keys, rows, None if last is None else rows),
    out_specs=queries,
    # The kernel does not say over which axes its results vary.
    check_vma=False,
  )(q, k, v, segments, last)


def _attend_rows(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array,
  last: jax.Array | None,
  *,
  make_kernel: Callable,
  padding: int,
  left: int | None,
) -> jax.Array:
  """Attends within the rows and heads of one device; see `attend`."""
  tokens = q.shape[1]
  if padding:
    # A segment of its own, so that padding sees itself alone.
    around = ((0, 0), (0, padding), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, around) for x in (q, k, v))
    segments = jnp.pad(segments, around[:2], constant_values=-1)
  if last is not None:
    position = jnp.arange(tokens + padding, dtype=jnp.int32)
    last = jnp.pad(last, ((0, 0), (0, padding)))
    last = jnp.maximum(last, position)
    if left is not None:
      last += position << _LAST_BITS

  def attend_row(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    last: jax.Array | None,
  ) -> jax.Array:
    ids = splash_kernel.SegmentIds(segments, segments)
    return make_kernel(last)(q, k, v, ids)

  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  out = jax.vmap(attend_row)(q, k, v, segments, last)
  return jnp.swapaxes(out, 1, 2)[:, :tokens]


@lru_cache
def _kernel(
  tokens: int, band: Band, bounded: bool, interpret: bool
) -> Callable[[jax.Array | None], splash_kernel.SplashAttentionKernel]:
  """Returns what makes the kernel of rows of so many tokens.

  The masks are numpy's: nothing here depends on what is being traced.
  """
  block = next(n for n in range(BLOCK, 0, -LANES) if tokens % n == 0)
  blocks: dict[str, Any] = dict.fromkeys(_BLOCKS, block)
  shape = (tokens, tokens)
  one_head: splash_mask.Mask = splash_mask.FullMask(shape)
  if band != Band(None, None):
    one_head = splash_mask.LocalMask(shape, band, 0)
  mask = splash_mask.MultiHeadMask((one_head,))
  sees: Callable | None
  forward, sees = mask_info.process_mask(mask, (block, block))
  backward, _ = mask_info.process_mask_dkv(mask, (block, block))
  if bounded:
    sees = _until_last if band.left is None else partial(_in_window, band.left)

  def make(last: jax.Array | None) -> splash_kernel.SplashAttentionKernel:
    queries, keys = forward, backward
    if bounded:
      # JAX's types ask for NumPy's arrays; its kernel takes JAX's too.
      queries = forward._replace(q_sequence=last)  # type: ignore[arg-type]
      keys = backward._replace(q_sequence=last)  # type: ignore[arg-type]
    return splash_kernel.SplashAttentionKernel(
      queries,
      queries,
      keys,
      block_sizes=splash_kernel.BlockSizes(**blocks),
      is_mqa=False,
      save_residuals=False,
      mask_value=splash_kernel.DEFAULT_MASK_VALUE,
      attn_logits_soft_cap=None,
      residual_checkpoint_name=None,
      mask_function=sees,
      interpret=interpret,
    )

  return make


_BLOCKS = (
  'block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv',
  'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq',
)  # fmt: skip


def _until_last(last: jax.Array, key: jax.Array) -> jax.Array:
  """Whether a query sees a key, by the last position that it sees."""
  return key <= last


def _in_window(left: int, packed: jax.Array, key: jax.Array) -> jax.Array:
  """The same, of a query that sees `left` positions before itself, too."""
  position = packed >> _LAST_BITS
  last = packed & (2**_LAST_BITS - 1)
  return (key <= last) & (key >= position - left)
