"""Where the KV caches of an index's documents are: on the disk or the host.

On the disk each document has a file of its own beside the index's shards,
`caches/00000/000000017.npy`, which is mapped into memory. It is written before
the shard that its document is in, so whatever document the index has, its
cache is whole.
"""

import collections
import os
import pathlib
from collections.abc import Callable

from grit_jax.inference.cache import KVCache

# Files of a folder.
_FILES = 10_000


class DiskCaches:
  """Caches in the folder of an index."""

  def __init__(self, folder: str | os.PathLike):
    """Names the folder.

    Args:
      folder: The index.
    """
    self.folder = pathlib.Path(folder) / 'caches'

  def path(self, number: int) -> pathlib.Path:
    """Returns the file of a document's cache."""
    return self.folder / f'{number // _FILES:05d}' / f'{number:09d}.npy'

  def read(self, number: int) -> KVCache:
    """Maps the cache of a document into memory.

    Raises:
      UserError: It is missing or damaged.
    """
    return KVCache.open(self.path(number))

  def write(self, number: int, cache: KVCache) -> None:
    """Writes the cache of a document."""
    path = self.path(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.save(path)

  def measure(self, documents: int) -> int:
    """Returns the bytes of the files of the first documents."""
    return sum(os.path.getsize(self.path(i)) for i in range(documents))


class HostCaches:
  """Caches in the host's memory, each made when it is first needed."""

  def __init__(
    self, make: Callable[[int], KVCache], dtype: str, max_bytes: int
  ):
    """Begins with nothing.

    Args:
      make: Makes the cache of the document of a number.
      dtype: What caches are kept in, `bfloat16` or `float32`.
      max_bytes: What they may take; those unused for longest go first.
    """
    self._make, self._dtype, self._max_bytes = make, dtype, max_bytes
    self._kept: collections.OrderedDict[int, KVCache] = (
      collections.OrderedDict()
    )

  @property
  def nbytes(self) -> int:
    """Bytes of the caches that are kept."""
    return sum(cache.nbytes for cache in self._kept.values())

  def __len__(self) -> int:
    """Returns the number of the caches that are kept."""
    return len(self._kept)

  def read(self, number: int) -> KVCache:
    """Returns the cache of a document."""
    if number not in self._kept:
      self._kept[number] = self._make(number).astype(self._dtype)
    self._kept.move_to_end(number)
    cache = self._kept[number]
    while self.nbytes > self._max_bytes:
      self._kept.popitem(last=False)
    return cache
