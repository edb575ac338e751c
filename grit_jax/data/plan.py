"""The plan: (seed, step) decides a step's records, passages and rows.

A pure function of the index of lengths, so that every host knows the whole
plan, and a resumed run goes on with the batches it would have seen.
"""

import dataclasses
import functools

import numpy as np

from grit_jax.config import Config, ConfigError
from grit_jax.data.dataset import EmbeddingDataset, GenerativeDataset
from grit_jax.data.packing import Packing, pack

# What a random draw is for; part of its seed, so that draws are independent.
_EMBEDDING_ORDER, _GENERATIVE_ORDER, _PASSAGES = range(3)


@dataclasses.dataclass(frozen=True)
class EmbeddingPlan:
  """A step's queries and passages.

  Attributes:
    datasets: int [Q], which data set each query is of.
    records: int [Q], its record in it.
    texts: int [Q, 1 + G], the query and its passages by their places in the
      record's texts (0 is the query), the positive before the negatives.
    lengths: int [Q, 1 + G], their tokens.
    packing: of the texts, flattened.
  """

  datasets: np.ndarray
  records: np.ndarray
  texts: np.ndarray
  lengths: np.ndarray
  packing: Packing


@dataclasses.dataclass(frozen=True)
class GenerativePlan:
  """A step's conversations.

  Attributes:
    datasets: int [N], which data set each is of.
    records: int [N], its record in it.
    lengths: int [N], its tokens.
    loss_tokens: int [N], those in the loss.
    packing: of the conversations.
  """

  datasets: np.ndarray
  records: np.ndarray
  lengths: np.ndarray
  loss_tokens: np.ndarray
  packing: Packing


class BatchOrder:
  """Which records each step takes.

  An epoch cuts every data set into batches; what is left over of all of them
  makes further batches, and at last fewer than a batch's records sit the epoch
  out. The batches come in random order.

  A batch is a stratified sample: the records, sorted by length, fall into as
  many strata as a batch has places, and each batch takes one of each at
  random. So all batches of a data set have nearly the same number of tokens,
  and few shapes fit them with little padding.
  """

  def __init__(
    self,
    name: str,
    lengths: list[np.ndarray],
    batch: int,
    seed: tuple[int, ...],
  ):
    """Lays down the order.

    Args:
      name: the key of the batch size, for messages.
      lengths: for each data set, the expected tokens of its records in a step.
      batch: records a step.
      seed: of the shuffles.

    Raises:
      ConfigError: there are fewer records than a batch takes.
    """
    self.starts = np.cumsum([0, *map(len, lengths)])
    self.lengths = np.concatenate(lengths)
    total = len(self.lengths)
    if total < batch:
      raise ConfigError(
        f'{name}={batch}, but there are only {total} such records.'
      )
    self.batch, self.seed = batch, seed
    self.batches_per_epoch = total // batch
    self.left_out_per_epoch = total % batch

  def _stratify(
    self, rng: np.random.Generator, records: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns batches of records, int64 [batches, B], and those left over."""
    records = rng.permutation(records)
    count = len(records) // self.batch
    kept, left = np.split(records, [count * self.batch])
    kept = kept[np.argsort(self.lengths[kept], kind='stable')]
    strata = rng.permuted(kept.reshape(self.batch, count), axis=1)
    # Within a batch the order is random again: groups of the `mixed` loss
    # must not be groups by length.
    return rng.permuted(strata.T, axis=1), left

  @functools.lru_cache(maxsize=2)  # noqa: B019 (an order lives as long as a run)
  def _epoch(self, epoch: int) -> np.ndarray:
    """Returns an epoch's batches, int64 [batches, B], over all data sets."""
    rng = np.random.default_rng([*self.seed, epoch])
    batches, leftovers = [], []
    for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True):
      whole, left = self._stratify(rng, np.arange(start, stop))
      batches.append(whole)
      leftovers.append(left)
    whole, _ = self._stratify(rng, np.concatenate(leftovers))
    return rng.permutation(np.concatenate([*batches, whole]), axis=0)

  def records(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the data set and the record of each place in a step's batch."""
    epoch, place = divmod(step, self.batches_per_epoch)
    chosen = self._epoch(epoch)[place]
    datasets = np.searchsorted(self.starts, chosen, side='right') - 1
    return datasets, chosen - self.starts[datasets]


class Plan:
  """Decides every step's batch from the index of the data sets."""

  def __init__(
    self,
    config: Config,
    embedding: list[EmbeddingDataset],
    generative: list[GenerativeDataset],
  ):
    """Takes the data sets that the mode needs; the other list is empty.

    Raises:
      ConfigError: there are fewer records than a batch takes.
    """
    self.config = config
    self.embedding, self.generative = embedding, generative
    data, seed = config.data, config.seed
    if embedding:
      self.embedding_order = BatchOrder(
        'data.embedding_batch',
        [_expected_tokens(dataset, data.num_passages) for dataset in embedding],
        data.embedding_batch,
        (seed, _EMBEDDING_ORDER),
      )
    if generative:
      # Conversations need no batch of their own data set: nothing in the
      # generative loss compares them.
      self.generative_starts = np.cumsum([0, *map(len, generative)])
      lengths = np.concatenate([dataset.lengths for dataset in generative])
      self.generative_order = BatchOrder(
        'data.generative_batch',
        [lengths],
        data.generative_batch,
        (seed, _GENERATIVE_ORDER),
      )

  def embedding_step(self, step: int) -> EmbeddingPlan | None:
    """Plans a step's queries and passages; None without embedding data."""
    if not self.embedding:
      return None
    data = self.config.data
    datasets, records = self.embedding_order.records(step)
    rng = np.random.default_rng([self.config.seed, _PASSAGES, step])
    texts = np.zeros((len(records), 1 + data.num_passages), np.int64)
    lengths = np.zeros_like(texts)
    for place, (which, record) in enumerate(
      zip(datasets, records, strict=True)
    ):
      dataset = self.embedding[which]
      start, stop = dataset.offsets[record : record + 2]
      positives = int(dataset.num_positives[record])
      negatives = int(stop - start) - 1 - positives
      texts[place, 1] = 1 + rng.integers(positives)
      texts[place, 2:] = (
        1
        + positives
        + rng.choice(negatives, data.num_passages - 1, replace=False)
      )
      lengths[place] = dataset.lengths[start + texts[place]]
    packing = pack(lengths.reshape(-1), data.row_length, data.max_segments)
    return EmbeddingPlan(datasets, records, texts, lengths, packing)

  def generative_step(self, step: int) -> GenerativePlan | None:
    """Plans a step's conversations; None without generative data."""
    if not self.generative:
      return None
    data = self.config.data
    _, places = self.generative_order.records(step)
    starts = self.generative_starts
    datasets = np.searchsorted(starts, places, side='right') - 1
    records = places - starts[datasets]
    lengths, loss_tokens = (
      np.array(
        [
          getattr(self.generative[which], name)[record]
          for which, record in zip(datasets, records, strict=True)
        ],
        np.int64,
      )
      for name in ('lengths', 'loss_tokens')
    )
    packing = pack(lengths, data.row_length, data.max_segments)
    return GenerativePlan(datasets, records, lengths, loss_tokens, packing)

  def describe_records(self, step: int) -> list[str]:
    """Names the records of a step's batch, for messages."""
    names = []
    for datasets, plan in (
      (self.embedding, self.embedding_step(step)),
      (self.generative, self.generative_step(step)),
    ):
      if plan is not None:
        names += [
          datasets[which].where(record)
          for which, record in zip(plan.datasets, plan.records, strict=True)
        ]
    return names


def _expected_tokens(
  dataset: EmbeddingDataset, num_passages: int
) -> np.ndarray:
  """Returns the tokens of each record's query and passages, on average."""
  starts = dataset.offsets[:-1]
  texts = np.diff(dataset.offsets)
  queries = dataset.lengths[starts]
  passages = np.add.reduceat(dataset.lengths, starts) - queries
  return queries + num_passages * passages / (texts - 1)
