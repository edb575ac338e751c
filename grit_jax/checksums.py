"""Checksums of arrays that depend neither on the mesh nor on the chunks.

An array's is the sum of its numbers, read as unsigned integers, each times an
odd number made of its position in the whole array, in uint32. An odd factor has
an inverse, so no change of a single number goes unseen.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: 'uint8', 2: 'uint16', 4: 'uint32'}
# Numbers summed at a time on the host: they stay in the cache.
_ODD = (2 * np.arange(1 << 16) + 1).astype(np.uint32)


@jax.jit
def sum_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the checksum of each array, uint32 [], on the devices."""
  return {path: _sum_array(array) for path, array in arrays.items()}


def _sum_array(x: jax.Array) -> jax.Array:
  words = jax.lax.bitcast_convert_type(x, jnp.dtype(_WORDS[x.dtype.itemsize]))
  position: Any = np.uint32(0)
  for axis, size in enumerate(x.shape):
    along = jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding
    )
    position = position * np.uint32(size) + along
  return jnp.sum(words.astype(jnp.uint32) * (2 * position + 1))


def sum_part(part: np.ndarray, start: int) -> int:
  """Returns what a part adds to the checksum of its array.

  Args:
    part: any dtype of one, two or four bytes; contiguous in the array.
    start: the position of its first number in the array.

  Returns:
    The sum; those of all parts, added modulo 2**32, are the array's checksum.
  """
  words = np.ascontiguousarray(part).reshape(-1)
  words = words.view(_WORDS[part.dtype.itemsize])
  total = 0
  for first in range(0, len(words), len(_ODD)):
    block = words[first : first + len(_ODD)].astype(np.uint32, copy=False)
    # 2 (start + first + i) + 1 is the i-th odd number, and a constant.
    total += int((block * _ODD[: len(block)]).sum(dtype=np.uint32))
    total += 2 * (start + first) * int(block.sum(dtype=np.uint32))
  return total % 2**32


def start_of(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
  """Returns the position of the first number of `array[index]`."""
  place = (*index, *([0] * (len(shape) - len(index))))
  return int(np.ravel_multi_index(place, shape)) if math.prod(shape) else 0
