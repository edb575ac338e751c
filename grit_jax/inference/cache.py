"""The KV cache of a text, on the host or on the disk.

Encoding a text leaves the keys and values of its tokens, which generation can
go on from (arXiv 2402.09906, section 4): a document that was encoded for the
index need not be read again to answer from it. A cache takes 2 * L * K * H
numbers a token: 131 kB in bfloat16 for GritLM-7B.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax
import ml_dtypes
import numpy as np
from etils import epath

from grit_jax.errors import UserError
from grit_jax.files import check_file, new_file

# How a file names its dtype: NumPy's format has no bfloat16.
_STORED: dict[str, np.dtype] = {
  'bfloat16': np.dtype(np.uint16),
  'float32': np.dtype(np.float32),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one text of S tokens.

  Attributes:
    keys: [L, K, S, H], rotated by their positions.
    values: [L, K, S, H].
  """

  keys: np.ndarray
  values: np.ndarray

  def __len__(self) -> int:
    """Returns the number of tokens."""
    return self.keys.shape[2]

  @property
  def nbytes(self) -> int:
    """Bytes of the keys and the values."""
    return self.keys.nbytes + self.values.nbytes

  def astype(self, dtype: str) -> 'KVCache':
    """Returns the cache in `float32` or `bfloat16`."""
    kind = to_dtype(dtype)
    return KVCache(
      self.keys.astype(kind, copy=False), self.values.astype(kind, copy=False)
    )

  @classmethod
  def join(cls, caches: Sequence['KVCache']) -> 'KVCache':
    """Puts the caches of several texts one behind the other.

    Their tokens keep the positions that they were encoded at, and have not seen
    each other: what the paper does for a query's and a document's.
    """
    return cls(
      np.concatenate([cache.keys for cache in caches], axis=2),
      np.concatenate([cache.values for cache in caches], axis=2),
    )

  def save(self, path: str | os.PathLike) -> None:
    """Writes the cache into one .npy file, which can be memory-mapped."""
    name = self.keys.dtype.name
    whole = np.stack([self.keys, self.values]).view(_STORED[name])
    with new_file(path) as file:
      np.save(file, whole)

  @classmethod
  def open(cls, path: epath.PathLike) -> 'KVCache':
    """Maps the file of a cache into memory.

    Raises:
      UserError: It is missing, or no cache.
    """
    check_file(path)
    try:
      whole = np.load(path, mmap_mode='r')
    except (OSError, ValueError, EOFError) as error:
      raise UserError(
        f'{path} is not the file of a KV cache: {error}'
      ) from error
    if (
      whole.ndim != 5
      or whole.shape[0] != 2
      or whole.dtype not in (*_STORED.values(),)
    ):
      raise UserError(
        f'{path} has an array of {whole.dtype}{list(whole.shape)}, not keys '
        'and values [2, L, K, S, H].'
      )
    if whole.dtype == np.uint16:
      whole = whole.view(ml_dtypes.bfloat16)
    return cls(whole[0], whole[1])


def to_dtype(name: str) -> np.dtype:
  """Returns NumPy's dtype for `float32` or `bfloat16`."""
  return np.dtype(ml_dtypes.bfloat16 if name == 'bfloat16' else name)
