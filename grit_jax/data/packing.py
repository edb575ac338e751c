"""Texts into rows: best-fit-decreasing bin packing."""

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packing:
  """Where each text lies.

  Attributes:
    rows: int32 [texts], the row of each text.
    segments: int32 [texts], 1 for the first text of its row, and up.
    offsets: int32 [texts], the place of its first token in the row.
    num_rows: rows in use.
  """

  rows: np.ndarray
  segments: np.ndarray
  offsets: np.ndarray
  num_rows: int

  def cut(self, rows: int) -> Iterator[tuple[np.ndarray, 'Packing']]:
    """Cuts the rows into parts of `rows` rows, the last of what is left.

    Yields:
      The texts of a part, ascending, and where they lie in it.
    """
    for start in range(0, self.num_rows, rows):
      inside = (self.rows >= start) & (self.rows < start + rows)
      texts = np.flatnonzero(inside)
      yield (
        texts,
        Packing(
          self.rows[texts] - start,
          self.segments[texts],
          self.offsets[texts],
          min(rows, self.num_rows - start),
        ),
      )


def pack(lengths: np.ndarray, row_length: int, max_segments: int) -> Packing:
  """Packs texts into as few rows as best-fit-decreasing finds.

  The longest text comes first; each goes where it leaves the least room. It
  needs at most 11/9 of the optimal rows (Johnson 1973), and with the length
  mixes of text a row more than the tokens would fill.

  Args:
    lengths: int [texts], tokens of each text, 1 to `row_length`.
    row_length: tokens a row.
    max_segments: texts a row, at most.

  Returns:
    The place of each text; the same for the same lengths.
  """
  lengths = np.asarray(lengths, np.int64)
  order = np.argsort(-lengths, kind='stable')
  used: list[int] = []  # tokens of each row
  texts: list[int] = []  # texts of each row
  # Open rows by the room left in them, and a bit set of the sizes of room
  # that some row has: the lowest bit at or above a length is the best fit.
  by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
  rooms = 0
  # What is placed at one time: row, number of texts, first segment and offset.
  placed: list[tuple[int, int, int, int]] = []
  sizes, counts = np.unique(lengths, return_counts=True)
  for length, count in zip(
    sizes[::-1].tolist(), counts[::-1].tolist(), strict=True
  ):
    while count:
      fitting = rooms >> length
      if fitting:
        room = length + (fitting & -fitting).bit_length() - 1
        row = by_room[room].pop()
        if not by_room[room]:
          rooms &= ~(1 << room)
      else:
        room, row = row_length, len(used)
        used.append(0)
        texts.append(0)
      # With a text in it the row is the best fit of the next one as well, if
      # that has the same length and still fits.
      number = min(room // length, max_segments - texts[row], count)
      placed.append((row, number, texts[row] + 1, used[row]))
      used[row] += number * length
      texts[row] += number
      count -= number
      room -= number * length
      if room and texts[row] < max_segments:
        by_room[room].append(row)
        rooms |= 1 << room
  return _unfold(placed, lengths, order, len(used))


def _unfold(
  placed: list[tuple[int, int, int, int]],
  lengths: np.ndarray,
  order: np.ndarray,
  num_rows: int,
) -> Packing:
  """Gives each text its place, from runs of texts in the order of packing."""
  row, number, segment, offset = np.array(placed, np.int64).reshape(-1, 4).T
  starts = np.cumsum(number) - number
  within = np.arange(len(order)) - np.repeat(starts, number)
  rows, segments, offsets = np.empty((3, len(order)), np.int32)
  rows[order] = np.repeat(row, number)
  segments[order] = np.repeat(segment, number) + within
  offsets[order] = np.repeat(offset, number) + within * lengths[order]
  return Packing(rows, segments, offsets, num_rows)


def choose_buckets(
  counts: np.ndarray, buckets: int, multiple: int
) -> list[tuple[int, int]]:
  """Chooses the row counts that steps are padded to, with the least padding.

  Steps are grouped by their first count (by the second where the first stream
  is absent), and a group is padded to its largest counts; dynamic programming
  finds the groups of least padding in all.

  Args:
    counts: int [steps, 2], rows of both streams in each step.
    buckets: shapes at most.
    multiple: row counts are rounded up to it: the shards of rows.

  Returns:
    At most `buckets` pairs of row counts, ascending in the first; every step
    fits one of them.
  """
  if not counts[:, 0].any() and counts[:, 1].any():
    swapped = choose_buckets(counts[:, ::-1], buckets, multiple)
    return [(0, rows) for rows, _ in swapped]
  rounded = -(-counts // multiple) * multiple
  first, inverse, steps = np.unique(
    rounded[:, 0], return_inverse=True, return_counts=True
  )
  second = np.zeros(len(first), np.int64)
  np.maximum.at(second, inverse, rounded[:, 1])
  before = np.concatenate([[0], np.cumsum(steps)])
  # best[j]: the rows of the steps of the j smallest first counts, in as many
  # groups as the round of the loop says; cut[...][j] begins the last group.
  best = np.full(len(first) + 1, np.inf)
  best[0] = 0
  cuts = []
  for _ in range(min(buckets, len(first))):
    grown, cut = best.copy(), np.full(len(first) + 1, -1)
    for stop in range(1, len(first) + 1):
      largest = np.maximum.accumulate(second[:stop][::-1])[::-1]
      size = first[stop - 1] + largest
      cost = best[:stop] + (before[stop] - before[:stop]) * size
      start = int(np.argmin(cost))
      if cost[start] < grown[stop]:
        grown[stop], cut[stop] = cost[start], start
    best = grown
    cuts.append(cut)
  shapes, stop = [], len(first)
  for cut in reversed(cuts):
    start = cut[stop]
    if start < 0:  # one group fewer was no worse
      continue
    shapes.append((int(first[stop - 1]), int(second[start:stop].max())))
    stop = start
    if not stop:
      break
  return shapes[::-1]


def smallest_bucket(
  counts: tuple[int, int], buckets: list[tuple[int, int]]
) -> tuple[int, int] | None:
  """Returns the bucket with the fewest rows that holds `counts`, if any."""
  fitting = [
    bucket
    for bucket in buckets
    if bucket[0] >= counts[0] and bucket[1] >= counts[1]
  ]
  return min(fitting, key=sum, default=None)
