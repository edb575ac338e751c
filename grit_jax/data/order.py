"""The order: which records each step takes, epoch after epoch."""

import functools

import numpy as np

from grit_jax.errors import ConfigError

# What a random draw is for; part of its seed, so that draws are independent.
_EPOCH, _CYCLE = range(2)


class BatchOrder:
  """Which records each step takes.

  Every data set has its records in a random cycle, and an epoch takes the next
  so many of them: each record comes as often as the others, but for one time,
  and none again before all have been there. Which batches they make is drawn
  anew in each epoch. Batches are of one data set, of several, or both, as
  `config.DataConfig.mixing` says, and come in random order. What is fewer than
  a batch at last sits the epoch out.

  A batch is a stratified sample: the records, sorted by length, fall into as
  many strata as a batch has places, and each batch takes one of each at
  random. So all batches of a data set have nearly the same number of tokens,
  and few shapes fit them with little padding. A record that an epoch takes
  several times is in as many batches.

  Four bytes a record are held for the lengths, and four for each place of the
  last two epochs asked for.

  Attributes:
    own_batches: for each data set, the batches an epoch of it alone.
    batches_per_epoch: all of them.
    left_out_per_epoch: records that sit an epoch out.
  """

  def __init__(
    self,
    name: str,
    lengths: list[np.ndarray],
    takes: list[int],
    batch: int,
    mixing: str,
    seed: tuple[int, ...],
  ):
    """Lays down the order.

    Args:
      name: the key of the batch size, for messages.
      lengths: for each data set, int32, the tokens of its records in a step.
      takes: for each data set, the records that an epoch takes of it; more
        than it has take some or all of them again.
      batch: records a step.
      mixing: `config.DataConfig.mixing`.
      seed: of the shuffles.

    Raises:
      ConfigError: an epoch has no batch of records that differ.
    """
    self.sizes, self.takes = [len(part) for part in lengths], takes
    if sum(self.sizes) >= 2**31:
      raise ConfigError(f'{name}: {sum(self.sizes)} records are 2^31 or more.')
    self.starts = np.cumsum([0, *self.sizes])
    self.lengths = np.concatenate(lengths)
    self.batch, self.seed = batch, seed
    self.own_batches, self.mixed_batches = self._count_batches(mixing)
    self.batches_per_epoch = sum(self.own_batches) + self.mixed_batches
    self.left_out_per_epoch = sum(takes) - self.batches_per_epoch * batch
    if self.batches_per_epoch:
      return
    different = [min(pair) for pair in zip(self.sizes, takes, strict=True)]
    if mixing == 'none':
      raise ConfigError(
        f"{name}={batch}, but data.mixing='none' fills a batch from one data "
        f'set, and none has more than {max(different)} records an epoch.'
      )
    raise ConfigError(
      f'{name}={batch}, but there are only {sum(different)} such records '
      'in an epoch.'
    )

  def _count_batches(self, mixing: str) -> tuple[list[int], int]:
    """Returns the batches of each data set alone, and the mixed ones."""
    pairs = list(zip(self.sizes, self.takes, strict=True))
    own = [0] * len(pairs)
    if mixing != 'all':
      # Fewer records than a batch would be in it twice.
      own = [take // self.batch * (size >= self.batch) for size, take in pairs]
    if mixing == 'none':
      return own, 0
    left = [n - k * self.batch for n, k in zip(self.takes, own, strict=True)]
    count = sum(left) // self.batch
    # No record is twice in a batch, so `count` batches have room for `count`
    # copies of it.
    while True:
      usable = sum(
        min(n, count * size) for n, size in zip(left, self.sizes, strict=True)
      )
      if usable >= count * self.batch:
        return own, count
      count = usable // self.batch

  def _take(self, which: int, epoch: int) -> np.ndarray:
    """Returns the records that an epoch takes of a data set, int32.

    Any `sizes[which]` that follow each other differ; the first
    `takes % sizes` are those taken once more than the others.
    """
    start, stop = self.starts[which], self.starts[which + 1]
    rng = np.random.default_rng([*self.seed, _CYCLE, which])
    cycle = rng.permutation(np.arange(start, stop, dtype=np.int32))
    take = self.takes[which]
    first = epoch * take % len(cycle)
    return np.take(cycle, np.arange(first, first + take), mode='wrap')

  def _leave(
    self, rng: np.random.Generator, which: int, records: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Parts an epoch's records of a data set into its own batches' and others.

    With own batches, the others differ from each other, and are those first
    that the epoch has once more: what is kept then fits the batches.
    """
    own, size = self.own_batches[which], self.sizes[which]
    if not own:
      return records[:0], records
    more = len(records) % size
    first = [rng.permutation(x) for x in (records[:more], records[more:size])]
    first = np.concatenate(first)
    left = len(records) - own * self.batch
    return np.concatenate([first[left:], records[size:]]), first[:left]

  def _stratify(
    self, rng: np.random.Generator, ties: np.ndarray, records: np.ndarray
  ) -> np.ndarray:
    """Returns batches, int32 [batches, B], of all the records.

    Args:
      rng: for the draws.
      ties: a number a record, which orders records of one length.
      records: a multiple of a batch, none of them more often than there are
        batches.
    """
    count = len(records) // self.batch
    if not count:
      return records.reshape(0, self.batch)
    keys = self.lengths[records].astype(np.int64) << 32 | ties[records]
    strata = records[np.argsort(keys)].reshape(self.batch, count)
    # Copies of a record lie together: in one stratum they go to different
    # batches of themselves, in two they may have to be parted.
    [split] = np.nonzero(strata[:-1, -1] == strata[1:, 0])
    copied = strata[split, -1]
    strata = rng.permuted(strata, axis=1)
    for stratum, record in zip(split, copied, strict=True):
      before, after = strata[stratum : stratum + 2] == record
      [clash] = np.nonzero(before & after)
      free = rng.permutation(np.flatnonzero(~before & ~after))[: len(clash)]
      row = strata[stratum + 1]
      row[clash], row[free] = row[free], record
    # Within a batch the order is random again: groups of the `mixed` loss
    # must not be groups by length.
    return rng.permuted(strata.T, axis=1)

  @functools.lru_cache(maxsize=2)  # noqa: B019 (an order lives as long as a run)
  def _epoch(self, epoch: int) -> np.ndarray:
    """Returns an epoch's batches, int32 [batches, B], over all data sets."""
    rng = np.random.default_rng([*self.seed, _EPOCH, epoch])
    ties = rng.permutation(np.arange(len(self.lengths), dtype=np.int32))
    batches, pool = [], []
    for which, size in enumerate(self.sizes):
      kept, left = self._leave(rng, which, self._take(which, epoch))
      batches.append(self._stratify(rng, ties, kept))
      pool.append(left[: self.mixed_batches * size])
    mixed = rng.permutation(np.concatenate(pool))
    mixed = mixed[: self.mixed_batches * self.batch]
    batches.append(self._stratify(rng, ties, mixed))
    return rng.permutation(np.concatenate(batches), axis=0)

  def records(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the data set and the record of each place in a step's batch."""
    epoch, place = divmod(step, self.batches_per_epoch)
    chosen = self._epoch(epoch)[place]
    datasets = np.searchsorted(self.starts, chosen, side='right') - 1
    return datasets, chosen - self.starts[datasets]
