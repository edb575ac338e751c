"""Attention over packed rows, with GRIT's attention modes.

Two kernels compute the same: `splash`, a flash kernel for TPUs, and `xla`,
blocks of plain operations, which run everywhere.

Letters: see `grit_jax.models.decoder`.
"""

import enum
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grit_jax.batch import Rows
from grit_jax.config import RotaryScalingConfig
from grit_jax.errors import ConfigError
from grit_jax.models import blockwise, splash
from grit_jax.sharding import platform

# q [B, T, N, H] scaled, k and v [B, T, K, H], to [B, T, N, H].
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Kind(enum.Enum):
  """Which later tokens of its own segment a token sees.

  A token always sees its segment's earlier tokens, and never another segment.
  """

  CAUSAL = 'none'
  BIDIRECTIONAL = 'all'
  INSTRUCTION = 'within its stretch of instruction'
  TEXT = 'within its stretch of text'


_KINDS = {
  'cc': Kind.CAUSAL,
  'bb': Kind.BIDIRECTIONAL,
  'bc': Kind.INSTRUCTION,
  'cb': Kind.TEXT,
}


def embedding_kind(attention: str) -> Kind:
  """Returns the embedding stream's kind for a mode such as `bbcc`."""
  return _KINDS[attention[:2]]


def generative_kind(attention: str) -> Kind:
  """Returns the generative stream's kind for a mode such as `bbcc`."""
  return _KINDS[attention[2:]]


def choose_kernel(name: str, platform: str) -> str:
  """Returns the kernel of a run, from `config.Config.attention_kernel`.

  Args:
    name: auto, splash or xla.
    platform: of the mesh's devices: tpu, gpu or cpu.

  Raises:
    ConfigError: the kernel does not run there.
  """
  if name == 'auto':
    return 'splash' if platform == 'tpu' else 'xla'
  if name == 'splash' and platform not in ('tpu', 'cpu'):
    raise ConfigError(
      f"attention_kernel='splash' is a kernel for TPUs, and the mesh's devices "
      f"are of the platform {platform!r}. 'auto' and 'xla' run there."
    )
  return name


def prepare(rows: Rows, kind: Kind, window: int, kernel: str) -> Attend:
  """Returns the attention of a stream, for all layers.

  What depends on the stream alone is computed here, once for all layers.

  Args:
    rows: the stream.
    kind: which later tokens of its segment a token sees.
    window: see `find_stretches`.
    kernel: see `choose_kernel`; the platform is that of the mesh in force.
  """
  if choose_kernel(kernel, platform()) == 'xla':
    stretches = find_stretches(rows, kind, window)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
      k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
      return blockwise.attend(q, k, v, *stretches)

    return attend
  reach = _reach(kind, window)
  left = reach - 1 if window else None
  right = 0 if kind is Kind.CAUSAL else left
  last = None
  if kind in (Kind.INSTRUCTION, Kind.TEXT):
    last = last_seen(rows, kind, window)
  return partial(
    splash.attend,
    segments=rows.segments,
    band=splash.Band(left, right),
    last=last,
    # The same program, interpreted where its compiler is missing.
    interpret=platform() == 'cpu',
  )


def _reach(kind: Kind, window: int) -> int:
  return window + (kind is Kind.BIDIRECTIONAL)


def last_seen(rows: Rows, kind: Kind, window: int) -> jax.Array:
  """Returns the last position that each token sees, int32 [B, T].

  Of the kinds with stretches: the end of its stretch, or its own position. All
  positions before that are seen, within the segment and the window.
  """
  index = jnp.arange(rows.segments.shape[1], dtype=jnp.int32)
  both = rows.in_instruction == (kind is Kind.INSTRUCTION)
  outside = jnp.where(both, index.size, index)
  last = jnp.maximum(jax.lax.cummin(outside, axis=1, reverse=True) - 1, index)
  return jnp.minimum(last, index + window - 1) if window else last


def find_stretches(
  rows: Rows, kind: Kind, window: int
) -> tuple[jax.Array, jax.Array]:
  """Returns which positions each token sees: the first and the last of them.

  Args:
    rows: the stream.
    kind: which later tokens of its segment a token sees.
    window: a token sees those less than this many positions away; 0: all. One
      more where all is bidirectional: so does transformers, and a window has
      no other definition there.

  Returns:
    Two int32 [B, T]. Padding sees nothing: its last is before its first.
  """
  segments = rows.segments
  index = jnp.arange(segments.shape[1], dtype=jnp.int32)
  first = index - rows.positions
  following = jnp.pad(segments, ((0, 0), (0, 1)))[:, 1:]
  ends = jnp.where(following != segments, index, index.size)
  last = jax.lax.cummin(ends, axis=1, reverse=True)
  reach = _reach(kind, window)
  if kind is Kind.CAUSAL:
    last = jnp.minimum(last, index)
  elif kind is not Kind.BIDIRECTIONAL:
    last = jnp.minimum(last, last_seen(rows, kind, window))
  elif window:
    last = jnp.minimum(last, index + reach - 1)
  if window:
    first = jnp.maximum(first, index - reach + 1)
  return first, jnp.where(segments > 0, last, -1)


def rotary_frequencies(
  head_dim: int, theta: float, scaling: RotaryScalingConfig
) -> np.ndarray:
  """Returns the frequencies theta^(-2i/H), scaled; float32 [H / 2].

  They are constants of the program: computed here as transformers does, in
  float32, so that both turn position 2047 by the same angle.
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  frequencies = np.float32(1) / np.float32(theta) ** exponents
  if scaling.kind == 'linear':
    return frequencies / np.float32(scaling.factor)
  if scaling.kind == 'llama3':
    # Turns of a frequency in the texts of pretraining decide its share.
    turns = scaling.original_positions * frequencies / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    scaled = frequencies / np.float32(scaling.factor)
    return (1 - kept) * scaled + kept * frequencies
  return frequencies


def rotary_angles(
  positions: jax.Array, frequencies: np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Returns cosine and sine of the rotary angles (Su et al. 2021, eq. 15).

  Args:
    positions: int32 [B, T].
    frequencies: float32 [H / 2], of `rotary_frequencies`.

  Returns:
    Two float32 [B, T, H / 2]: bfloat16 would turn positions above 256 into
    their neighbours'.
  """
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: jax.Array, angles: tuple[jax.Array, jax.Array], scale: float = 1.0
) -> jax.Array:
  """Turns the pairs (i, i + H/2) of each head, [B, T, N, H], by `angles`.

  The result is multiplied by `scale` in float32: a factor of the softmax's that
  came later would round bfloat16 queries twice.
  """
  cos, sin = (scale * a[:, :, None] for a in angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
