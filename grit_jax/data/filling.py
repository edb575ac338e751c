"""Packed rows are filled with tokens: those of one process's devices."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from grit_jax.batch import Rows
from grit_jax.data.formats import Conversation, EmbeddingText
from grit_jax.data.packing import Packing


@dataclasses.dataclass(frozen=True)
class RowShards:
  """How a mesh splits rows, and what of them this process holds.

  Attributes:
    count: shards of rows, over all processes; each has equally many rows.
    own: the numbers of this process's shards, ascending.
  """

  count: int
  own: tuple[int, ...]

  @classmethod
  def whole(cls, count: int) -> 'RowShards':
    """All shards: those of a run of one process."""
    return cls(count, tuple(range(count)))


class Filler:
  """Writes values of tokens into this process's packed rows; padding is 0.

  Attributes:
    texts: int [n], which texts lie in these rows, ascending.
    positions: int [tokens], of the tokens of these texts, from 0 in each.
  """

  def __init__(
    self,
    packing: Packing,
    lengths: np.ndarray,
    num_rows: int,
    row_length: int,
    chunk_rows: int,
    shards: RowShards,
  ):
    """Lays down the places.

    Args:
      packing: where each text goes.
      lengths: int [texts], their tokens.
      num_rows: rows of all processes, padding included.
      row_length: tokens a row.
      chunk_rows: rows a chunk of gradient caching; 0: one pass.
      shards: what to fill. With chunks, each chunk is split into shards.
    """
    block = chunk_rows or num_rows
    size = block // shards.count
    own_rows = size * len(shards.own)
    chunks = (num_rows // chunk_rows,) if chunk_rows else ()
    self._shape = (*chunks, own_rows, row_length)
    # Where each shard's rows begin among this process's; -1: not here.
    starts = np.full(shards.count, -1)
    starts[list(shards.own)] = np.arange(len(shards.own)) * size
    chunk, row = np.divmod(packing.rows.astype(np.int64), block)
    shard, row = np.divmod(row, size)
    self.texts = np.flatnonzero(starts[shard] >= 0)
    rows = (chunk * own_rows + starts[shard] + row)[self.texts]
    self._segments = packing.segments[self.texts]
    self._lengths = np.asarray(lengths)[self.texts]
    ends = np.cumsum(self._lengths)
    total = int(ends[-1]) if len(ends) else 0
    self.positions = np.arange(total) - self.repeat(ends - self._lengths)
    first = rows * row_length + packing.offsets[self.texts]
    self._places = self.repeat(first) + self.positions

  def repeat(self, values: np.ndarray) -> np.ndarray:
    """Turns [n], a value a text, into [tokens]."""
    return np.repeat(values, self._lengths)

  def join(self, values: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Turns an array a text, a value a token, into [tokens]."""
    return np.concatenate([np.empty(0, dtype), *values])

  def __call__(self, values: np.ndarray, dtype: type) -> np.ndarray:
    """Lays out values, [tokens], in rows: [R, T] or [chunks, R, T]."""
    out = np.zeros(self._shape, dtype)
    out.reshape(-1)[self._places] = values
    return out

  def rows(
    self, ids: Sequence[np.ndarray], in_instruction: np.ndarray
  ) -> Rows[np.ndarray]:
    """Returns what the decoder reads.

    Args:
      ids: the token ids of each text of `texts`.
      in_instruction: bool [tokens].
    """
    return Rows(
      self(self.join(ids, np.int32), np.int32),
      self(self.repeat(self._segments), np.int32),
      self(self.positions, np.int32),
      self(in_instruction, bool),
    )


def fill_texts(
  fill: Filler, texts: Sequence[EmbeddingText | Conversation]
) -> Rows[np.ndarray]:
  """Returns what the decoder reads, of the texts of `fill.texts`."""
  return fill.rows(
    [text.ids for text in texts],
    fill.join([text.in_instruction for text in texts], bool),
  )
