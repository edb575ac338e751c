"""Tests of grit_jax/data/packing.py."""

import itertools

import numpy as np
import pytest

from grit_jax.data import packing

ROW = 256
# Rows beyond the fewest that could hold the tokens, as a share. The five mixes
# below need none, in 127 to 140 rows; this allows three.
WASTE = 0.03


def draw_mix(seed: int, count: int = 800) -> np.ndarray:
  """Lengths of text: log-normal about 30 tokens, long ones cut at the row."""
  lengths = np.random.default_rng(seed).lognormal(3.4, 0.9, count)
  return np.clip(lengths.astype(np.int64), 1, ROW)


def fewest_rows(lengths: np.ndarray, row: int) -> int:
  """The optimum, by trying every way to put each text into a row."""
  best = len(lengths)

  def place(rest: tuple[int, ...], rooms: list[int]) -> None:
    nonlocal best
    if len(rooms) >= best:
      return
    if not rest:
      best = len(rooms)
      return
    for i, room in enumerate(rooms):
      if room >= rest[0]:
        place(rest[1:], [*rooms[:i], room - rest[0], *rooms[i + 1 :]])
    place(rest[1:], [*rooms, row - rest[0]])

  place(tuple(sorted(map(int, lengths), reverse=True)), [])
  return best


@pytest.mark.parametrize('max_segments', [1, 3, 128])
@pytest.mark.parametrize('seed', [0, 1])
def test_texts_neither_overlap_nor_leave_their_row(seed, max_segments):
  lengths = draw_mix(seed, 300)
  packed = packing.pack(lengths, ROW, max_segments)
  taken = np.zeros((packed.num_rows, ROW), np.int64)
  for row, offset, length in zip(
    packed.rows, packed.offsets, lengths, strict=True
  ):
    assert offset >= 0 and offset + length <= ROW
    taken[row, offset : offset + length] += 1
  assert taken.max() == 1
  assert taken.sum() == lengths.sum()
  assert (taken.sum(axis=1) > 0).all()


@pytest.mark.parametrize('max_segments', [1, 3, 128])
def test_segments_of_a_row_count_up_in_order_and_not_beyond_the_most(
  max_segments,
):
  packed = packing.pack(draw_mix(0, 300), ROW, max_segments)
  largest = 0
  for row in range(packed.num_rows):
    inside = packed.rows == row
    in_order = packed.segments[inside][np.argsort(packed.offsets[inside])]
    np.testing.assert_array_equal(in_order, 1 + np.arange(len(in_order)))
    largest = max(largest, len(in_order))
  assert largest <= max_segments
  if max_segments < 128:  # the limit was met, not merely kept
    assert largest == max_segments


def test_a_text_follows_the_one_before_it_without_a_gap():
  lengths = draw_mix(0, 300)
  packed = packing.pack(lengths, ROW, 128)
  for row in range(packed.num_rows):
    inside = np.flatnonzero(packed.rows == row)
    inside = inside[np.argsort(packed.segments[inside])]
    ends = np.cumsum(lengths[inside])
    np.testing.assert_array_equal(packed.offsets[inside], [0, *ends[:-1]])


@pytest.mark.parametrize('rows', [1, 4, 100])
def test_parts_have_each_text_once_where_it_lay(rows: int):
  lengths = np.random.default_rng(0).integers(1, 65, 60)
  whole = packing.pack(lengths, 64, 8)
  last = whole.num_rows % rows or rows
  seen = []
  for number, (texts, part) in enumerate(whole.cut(rows)):
    np.testing.assert_array_equal(part.rows + number * rows, whole.rows[texts])
    np.testing.assert_array_equal(part.segments, whole.segments[texts])
    np.testing.assert_array_equal(part.offsets, whole.offsets[texts])
    ends = (number + 1) * rows >= whole.num_rows
    assert part.num_rows == part.rows.max() + 1 == (last if ends else rows)
    seen += texts.tolist()
  assert sorted(seen) == list(range(60))


@pytest.mark.parametrize('seed', range(5))
def test_a_realistic_mix_fills_all_but_few_tokens(seed):
  lengths = draw_mix(seed)
  packed = packing.pack(lengths, ROW, 128)
  fewest = -(-lengths.sum() // ROW)
  assert fewest <= packed.num_rows <= (1 + WASTE) * fewest


@pytest.mark.parametrize('seed', range(10))
def test_rows_are_at_most_eleven_ninths_of_the_optimum_and_one(seed):
  # Lengths between a fifth and two thirds of a row are hard to pack.
  lengths = np.random.default_rng(seed).integers(7, 21, 11)
  packed = packing.pack(lengths, 32, 128)
  assert packed.num_rows <= 11 / 9 * fewest_rows(lengths, 32) + 1


def test_a_text_goes_where_it_leaves_the_least_room():
  # 6 and 5 leave rooms of 4 and 5: 4 fits both, and the first exactly.
  packed = packing.pack(np.array([4, 5, 6]), 10, 8)
  np.testing.assert_array_equal(packed.rows, [0, 1, 0])


def test_full_rows_take_a_text_each():
  packed = packing.pack(np.full(5, ROW), ROW, 8)
  np.testing.assert_array_equal(packed.rows, np.arange(5))
  assert packed.num_rows == 5


def test_the_same_lengths_are_packed_the_same():
  lengths = draw_mix(3)
  one, other = (packing.pack(lengths.copy(), ROW, 128) for _ in range(2))
  for name in ('rows', 'segments', 'offsets'):
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
  assert one.num_rows == other.num_rows


def draw_counts(seed: int, steps: int = 12) -> np.ndarray:
  """Row counts of both streams, which vary apart."""
  rng = np.random.default_rng(seed)
  return np.stack(
    [rng.integers(20, 60, steps), rng.integers(5, 40, steps)], axis=1
  )


def total_rows(
  counts: np.ndarray, buckets: list[tuple[int, int]], by: int = 0
) -> int:
  """Rows computed where a step takes the first bucket by one stream's count."""
  return sum(
    sum(next(bucket for bucket in buckets if bucket[by] >= step[by]))
    for step in counts
  )


def fewest_total_rows(
  counts: np.ndarray, buckets: int, multiple: int, by: int = 0
) -> int:
  """The least over every grouping that is contiguous in one stream's count."""
  rounded = -(-counts // multiple) * multiple
  values = np.unique(rounded[:, by])
  best = np.inf
  for groups in range(1, min(buckets, len(values)) + 1):
    for cuts in itertools.combinations(range(1, len(values)), groups - 1):
      total = 0
      for part in np.split(values, cuts):
        inside = rounded[np.isin(rounded[:, by], part)]
        total += len(inside) * inside.max(axis=0).sum()
      best = min(best, total)
  return int(best)


CASES = [
  (seed, buckets, multiple)
  for seed in range(4)
  for buckets in (1, 2, 3, 5)
  for multiple in (1, 4, 8)
]


@pytest.mark.parametrize('seed, buckets, multiple', CASES)
def test_buckets_pad_no_more_than_the_best_grouping(seed, buckets, multiple):
  counts = draw_counts(seed)
  chosen = packing.choose_buckets(counts, buckets, multiple)
  assert total_rows(counts, chosen) == fewest_total_rows(
    counts, buckets, multiple
  )


@pytest.mark.parametrize('seed, buckets, multiple', CASES)
def test_buckets_hold_every_step_are_multiples_and_at_most_as_many(
  seed, buckets, multiple
):
  counts = draw_counts(seed)
  chosen = packing.choose_buckets(counts, buckets, multiple)
  assert 1 <= len(chosen) <= buckets
  assert all(rows % multiple == 0 for bucket in chosen for rows in bucket)
  assert chosen == sorted(chosen)
  total = 0
  for step in counts:
    bucket = packing.smallest_bucket(tuple(step), chosen)
    assert bucket in chosen
    assert bucket[0] >= step[0] and bucket[1] >= step[1]
    total += sum(bucket)
  assert total <= total_rows(counts, chosen)


@pytest.mark.parametrize('seed', range(4))
def test_more_buckets_never_pad_more(seed):
  counts = draw_counts(seed, steps=60)
  totals = [
    total_rows(counts, packing.choose_buckets(counts, buckets, 4))
    for buckets in range(1, 12)
  ]
  assert totals == sorted(totals, reverse=True)
  assert totals[-1] < totals[0]


def test_one_step_that_all_others_equal_is_one_bucket():
  counts = np.tile([[5, 3]], (7, 1))
  assert packing.choose_buckets(counts, 4, 2) == [(6, 4)]


@pytest.mark.parametrize('absent', [0, 1])
@pytest.mark.parametrize('buckets', [1, 3])
def test_an_absent_stream_has_no_rows_and_costs_no_padding(absent, buckets):
  counts = draw_counts(0)
  counts[:, absent] = 0
  chosen = packing.choose_buckets(counts, buckets, 4)
  assert all(bucket[absent] == 0 for bucket in chosen)
  present = 1 - absent
  assert total_rows(counts, chosen, present) == fewest_total_rows(
    counts, buckets, 4, present
  )


@pytest.mark.parametrize(
  'counts, bucket',
  [((3, 3), (4, 8)), ((5, 1), (8, 4)), ((4, 8), (4, 8)), ((1, 9), (8, 16))],
)
def test_the_smallest_bucket_is_the_one_of_fewest_rows_that_holds(
  counts, bucket
):
  buckets = [(4, 8), (8, 4), (8, 16)]
  assert packing.smallest_bucket(counts, buckets) == bucket
