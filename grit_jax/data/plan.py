"""The plan: (seed, step) decides a step's records, passages and rows.

A pure function of the index of lengths, so that every host knows the whole
plan, and a resumed run goes on with the batches it would have seen.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from absl import logging

from grit_jax.config import Config, DataConfig, parse_numbers
from grit_jax.data import negatives
from grit_jax.data.dataset import Dataset, EmbeddingDataset, GenerativeDataset
from grit_jax.data.order import BatchOrder
from grit_jax.data.packing import Packing, pack
from grit_jax.errors import ConfigError

# What a random draw is for; part of its seed, so that draws are independent.
_EMBEDDING_ORDER, _GENERATIVE_ORDER, _PASSAGES = range(3)

AnyDataset = TypeVar('AnyDataset', bound=Dataset)

# Records whose index is looked at together.
_CHUNK = 1 << 18


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
      ConfigError: there are fewer records than a batch takes, or
        `data.weights` or `data.caps` names no data set.
    """
    self.config = config
    self.embedding, self.generative = embedding, generative
    data, seed = config.data, config.seed
    takes = count_records(data, [*embedding, *generative])
    if embedding:
      self.embedding_order = BatchOrder(
        'data.embedding_batch',
        [_expected_tokens(dataset, data) for dataset in embedding],
        takes[: len(embedding)],
        data.embedding_batch,
        data.mixing,
        (seed, _EMBEDDING_ORDER),
      )
      if data.mixing == 'none':
        _report_unused(embedding, self.embedding_order)
    if generative:
      # Conversations need no batch of their own data set: nothing in the
      # generative loss compares them.
      self.generative_order = BatchOrder(
        'data.generative_batch',
        [dataset.lengths for dataset in generative],
        takes[len(embedding) :],
        data.generative_batch,
        'all',
        (seed, _GENERATIVE_ORDER),
      )

  def embedding_step(self, step: int) -> EmbeddingPlan | None:
    """Plans a step's queries and passages; None without embedding data."""
    if not self.embedding:
      return None
    data = self.config.data
    datasets, records = self.embedding_order.records(step)
    starts, sizes, positives = np.empty((3, len(records)), np.int64)
    for dataset, places in _by_dataset(self.embedding, datasets):
      chosen = records[places]
      starts[places] = dataset.offsets[chosen]
      sizes[places] = dataset.offsets[chosen + 1] - starts[places]
      positives[places] = dataset.num_positives[chosen]
    texts = negatives.choose_passages(
      np.random.default_rng([self.config.seed, _PASSAGES, step]),
      positives,
      sizes - 1 - positives,
      data.num_passages,
      data.hard_negatives,
    )
    lengths = np.empty_like(texts)
    for dataset, places in _by_dataset(self.embedding, datasets):
      lengths[places] = dataset.lengths[starts[places, None] + texts[places]]
    packing = pack(lengths.reshape(-1), data.row_length, data.max_segments)
    return EmbeddingPlan(datasets, records, texts, lengths, packing)

  def scored(self, plan: EmbeddingPlan) -> np.ndarray:
    """Returns which passages each query is compared with, bool [Q, Q * G].

    See `negatives.compare`. Not in the step's plan, since planning a run's
    rows goes through all steps, and does not need it.
    """
    hashes = np.empty(plan.texts.shape, np.uint64)
    owners, positives = [], []
    for dataset, places in _by_dataset(self.embedding, plan.datasets):
      records = plan.records[places]
      starts = dataset.offsets[records]
      hashes[places] = dataset.text_hashes[starts[:, None] + plan.texts[places]]
      counts = dataset.num_positives[records]
      owners.append(np.repeat(places, counts))
      # The numbers from 1 to a record's count, after its start.
      within = 1 + np.arange(counts.sum())
      within -= np.repeat(np.cumsum(counts) - counts, counts)
      known = np.repeat(starts, counts) + within
      positives.append(dataset.text_hashes[known])
    return negatives.compare(
      hashes[:, 0],
      hashes[:, 1:],
      np.concatenate(owners),
      np.concatenate(positives),
      self.config.data.negatives,
      self.config.data.mask_known_positives,
    )

  def generative_step(self, step: int) -> GenerativePlan | None:
    """Plans a step's conversations; None without generative data."""
    if not self.generative:
      return None
    data = self.config.data
    datasets, records = self.generative_order.records(step)
    lengths, loss_tokens = np.empty((2, len(records)), np.int64)
    for dataset, places in _by_dataset(self.generative, datasets):
      lengths[places] = dataset.lengths[records[places]]
      loss_tokens[places] = dataset.loss_tokens[records[places]]
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


def count_records(data: DataConfig, datasets: Sequence[Dataset]) -> list[int]:
  """Returns the records that an epoch takes of each data set.

  Raises:
    ConfigError: `data.weights` or `data.caps` names another data set.
  """
  names = [dataset.name for dataset in datasets]
  given = {}
  for key in ('weights', 'caps'):
    text = getattr(data, key)
    given[key] = parse_numbers(f'data.{key}', text)
    for name in given[key]:
      if name not in names:
        raise ConfigError(
          f'data.{key}={text!r}: {name!r} is none of the data sets in use: '
          f'{", ".join(names)}.'
        )
  takes = []
  for dataset in datasets:
    take = round(given['weights'].get(dataset.name, 1) * len(dataset))
    take = min(take, int(given['caps'].get(dataset.name, take)))
    if take != len(dataset):
      logging.info(
        '%s: an epoch takes %d of its %d records%s.',
        dataset.name,
        take,
        len(dataset),
        '' if take else '; the data set is left out',
      )
    takes.append(take)
  return takes


def _report_unused(datasets: Sequence[Dataset], order: BatchOrder) -> None:
  """Warns of data sets that make no batch of their own."""
  for dataset, take, own in zip(
    datasets, order.takes, order.own_batches, strict=True
  ):
    if take and not own:
      logging.warning(
        '%s: %d different records an epoch are no batch of %d, and with '
        "data.mixing='none' the data set is never used.",
        dataset.name,
        min(take, len(dataset)),
        order.batch,
      )


def _by_dataset(
  datasets: Sequence[AnyDataset], which: np.ndarray
) -> Iterator[tuple[AnyDataset, np.ndarray]]:
  """Yields each data set of a batch, and its places there."""
  for number in np.unique(which):
    yield datasets[number], np.flatnonzero(which == number)


def _expected_tokens(dataset: EmbeddingDataset, data: DataConfig) -> np.ndarray:
  """Returns the tokens of each record in a step on average, int32 [n]."""
  expected = np.empty(len(dataset), np.int32)
  hard = data.num_passages - 1
  for begin in range(0, len(dataset), _CHUNK):
    chunk = slice(begin, begin + _CHUNK)
    bounds = dataset.offsets[begin : begin + _CHUNK + 1]
    lengths = dataset.lengths[bounds[0] : bounds[-1]]
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    starts, stops = bounds[:-1] - bounds[0], bounds[1:] - bounds[0]
    firsts = starts + 1 + dataset.num_positives[chunk]  # of the negatives
    if data.hard_negatives == 'fixed':
      stops = firsts + hard
    positive = (before[firsts] - before[starts + 1]) / (firsts - starts - 1)
    negative = (before[stops] - before[firsts]) / np.maximum(stops - firsts, 1)
    expected[chunk] = np.rint(lengths[starts] + positive + hard * negative)
  return expected
