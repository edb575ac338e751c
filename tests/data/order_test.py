"""Tests of grit_jax/data/order.py."""

from collections import Counter

import numpy as np
import pytest

from grit_jax.data.order import BatchOrder
from grit_jax.errors import ConfigError

# Sizes, records an epoch, and the size of a batch: whole and broken numbers of
# passes, sets smaller than a batch, and one that is left out.
CASES = [
  ([19, 9, 14], [19, 9, 14], 8),
  ([19, 9, 14], [38, 27, 14], 8),
  ([19, 9, 14], [10, 22, 3], 8),
  ([3, 5, 40, 9], [9, 12, 0, 9], 8),
  ([8, 3], [12, 7], 8),
  ([8, 8, 8], [8, 17, 23], 8),
  ([5, 4], [61, 4], 4),
  ([1000], [700], 7),
]


def make_order(
  sizes: list[int],
  takes: list[int] | None = None,
  batch: int = 8,
  mixing: str = 'leftovers',
  seed: int = 0,
) -> BatchOrder:
  """An order of records with lengths of few values, so that many are equal."""
  rng = np.random.default_rng(1)
  lengths = [rng.integers(1, 9, size).astype(np.int32) for size in sizes]
  return BatchOrder('batch', lengths, takes or sizes, batch, mixing, (seed,))


def epoch_of(order: BatchOrder, epoch: int) -> list[list[tuple[int, int]]]:
  """The batches of an epoch, as data sets and records."""
  count = order.batches_per_epoch
  return [
    list(zip(*(x.tolist() for x in order.records(step)), strict=True))
    for step in range(epoch * count, (epoch + 1) * count)
  ]


@pytest.mark.parametrize('mixing', ['leftovers', 'none', 'all'])
@pytest.mark.parametrize(('sizes', 'takes', 'batch'), CASES)
def test_epochs_take_what_they_may_and_no_batch_has_a_record_twice(
  sizes, takes, batch, mixing
):
  order = make_order(sizes, takes, batch, mixing)
  for epoch in range(12):
    batches = epoch_of(order, epoch)
    for one in batches:
      assert len(set(one)) == batch
    times = Counter(key for one in batches for key in one)
    left_out = sum(takes) - sum(times.values())
    assert left_out == order.left_out_per_epoch
    for (which, record), count in times.items():
      assert 0 <= record < sizes[which]
      assert count <= -(-takes[which] // sizes[which])
    kinds = [{which for which, _ in one} for one in batches]
    if mixing == 'none':
      assert all(len(kind) == 1 for kind in kinds)
    if mixing != 'all':
      own = Counter(min(kind) for kind in kinds if len(kind) == 1)
      for which, (size, take) in enumerate(zip(sizes, takes, strict=True)):
        if size >= batch:
          # At least: a mixed batch can happen to be of one data set.
          assert own[which] >= take // batch


def most_batches(sizes: list[int], takes: list[int], batch: int) -> int:
  """Batches of records that differ, filled greedily: the best there is.

  Each batch takes those records that have most copies left.
  """
  copies = [
    take // size + (record < take % size)
    for size, take in zip(sizes, takes, strict=True)
    for record in range(size)
  ]
  count = 0
  while True:
    copies.sort(reverse=True)
    if len(copies) < batch or not copies[batch - 1]:
      return count
    copies[:batch] = [copy - 1 for copy in copies[:batch]]
    count += 1


@pytest.mark.parametrize(('sizes', 'takes', 'batch'), CASES)
def test_nothing_is_left_out_that_could_be_in_a_batch(sizes, takes, batch):
  order = make_order(sizes, takes, batch, 'all')
  assert order.batches_per_epoch == most_batches(sizes, takes, batch)
  # Data set by data set, what batches of its own cannot hold.
  order = make_order(sizes, takes, batch, 'none')
  assert order.own_batches == [
    most_batches([size], [take], batch)
    for size, take in zip(sizes, takes, strict=True)
  ]


@pytest.mark.parametrize(
  ('size', 'take'), [(12, 12), (12, 6), (12, 9), (12, 4), (10, 15), (12, 24)]
)
def test_no_record_comes_again_before_all_have_been_there(size, take):
  # Batches of one: nothing sits out.
  order = make_order([size], [take], 1)
  assert order.left_out_per_epoch == 0
  times = np.zeros(size, int)
  for epoch in range(12):
    for [(_, record)] in epoch_of(order, epoch):
      times[record] += 1
    assert times.sum() == (epoch + 1) * take
    assert times.max() - times.min() <= 1


def test_half_of_the_records_come_in_an_epoch_and_the_others_in_the_next():
  order = make_order([16], [8], 4)
  halves = [
    {key for one in epoch_of(order, epoch) for key in one} for epoch in range(4)
  ]
  assert all(len(half) == 8 for half in halves)
  assert not halves[0] & halves[1] and not halves[2] & halves[3]
  # But in other batches when they come again.
  batches = [
    {frozenset(one) for one in epoch_of(order, epoch)} for epoch in (0, 2)
  ]
  assert not batches[0] & batches[1]


@pytest.mark.parametrize('mixing', ['leftovers', 'none', 'all'])
def test_an_order_is_the_same_whenever_and_wherever_it_is_asked(mixing):
  sizes, takes = [19, 9, 14], [30, 9, 7]
  one, other = (make_order(sizes, takes, mixing=mixing) for _ in range(2))
  steps = list(range(4 * one.batches_per_epoch))
  forward = [one.records(step) for step in steps]
  for step in steps[::-1]:
    np.testing.assert_array_equal(other.records(step), forward[step])
  another = make_order(sizes, takes, mixing=mixing, seed=1)
  assert epoch_of(another, 0) != epoch_of(one, 0)


def test_every_record_is_as_likely_to_be_left_out():
  # 20 and 9 records: 4 sit out and 1 does. In batches of several it is 5 of 29.
  for mixing, shares in (('none', (4 / 20, 1 / 9)), ('all', (5 / 29, 5 / 29))):
    order = make_order([20, 9], batch=8, mixing=mixing)
    times = np.zeros((2, 20))
    for epoch in range(800):
      for one in epoch_of(order, epoch):
        for key in one:
          times[key] += 1
    for which, (size, share) in enumerate(zip((20, 9), shares, strict=True)):
      found = 1 - times[which, :size] / 800
      # Five standard deviations of a share of 800.
      assert (
        np.abs(found - share).max() < 5 * (share * (1 - share) / 800) ** 0.5
      )


def test_any_two_records_of_one_length_meet_as_often():
  # Eight records of one length, four a batch: ties are broken anew every time,
  # or some two would always be of one stratum and never meet.
  lengths = [np.full(8, 3, np.int32)]
  order = BatchOrder('batch', lengths, [8], 4, 'none', (0,))
  together = np.zeros((8, 8))
  for step in range(4000):
    _, records = order.records(step)
    together[np.ix_(records, records)] += 1
  share = together[~np.eye(8, dtype=bool)] / 4000
  expected = 4 / 8 * 3 / 7
  deviation = (expected * (1 - expected) / 4000) ** 0.5
  assert np.abs(share - expected).max() < 5 * deviation


@pytest.mark.parametrize('takes', [6400, 9600])
def test_batches_of_a_data_set_have_nearly_equal_tokens(takes):
  lengths = np.random.default_rng(0).lognormal(5, 0.8, 6400).astype(np.int32)
  order = BatchOrder('batch', [lengths], [takes], 64, 'leftovers', (0,))
  steps = range(order.batches_per_epoch)
  assert len(steps) == takes // 64
  batches = [lengths[order.records(step)[1]] for step in steps]
  tokens = np.array([batch.sum() for batch in batches])
  # A random sample of 64 such lengths varies by 12%.
  assert tokens.std() / tokens.mean() < 0.03
  # In a batch they come in random order, so that any slice of it is a sample.
  first_half = sum(batch[:32].sum() for batch in batches)
  assert 0.45 < first_half / tokens.sum() < 0.55


def test_an_epoch_without_a_batch_is_refused():
  make_order([5, 3], batch=8)
  with pytest.raises(ConfigError, match='batch=9, but there are only 8 such'):
    make_order([5, 3], batch=9)
  # Copies of a record fill no batch.
  with pytest.raises(ConfigError, match='batch=9, but there are only 8 such'):
    make_order([5, 3], [50, 30], batch=9)
  with pytest.raises(ConfigError, match='mixing=.none.*more than 5 records'):
    make_order([5, 3], [50, 30], batch=6, mixing='none')


def test_more_records_than_an_int32_counts_are_refused():
  many = np.broadcast_to(np.int32(1), 2**30)  # takes no memory
  with pytest.raises(ConfigError, match='2147483648 records are 2.31 or more'):
    BatchOrder('batch', [many, many], [2**30, 2**30], 8, 'all', (0,))
