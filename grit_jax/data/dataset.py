"""Tokenized data sets: TFDS in array_record, with an index of lengths.

A data set is tokenized once and reused while its content, the tokenizer and
the limits stay the same; the name of its folder says so. In the folder:

- `records/`: the tokens, a TFDS data set, in the order of the source;
- `*.npy`: the index, mapped into memory, all that planning batches needs;
- `report.json`: what was read, cut and dropped.

The TFDS data set is written with `tfds.core.SequentialWriter`. A
GeneratorBasedBuilder would collect a split in memory, and beyond 1 GB would
turn to TensorFlow.
"""

import array
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import dataset_info

from grit_jax.data import examples, records
from grit_jax.data.examples import EmbeddingEncoder, GenerativeEncoder, Report
from grit_jax.data.formats import Conversation, EmbeddingText
from grit_jax.data.records import RecordError
from grit_jax.data.sources import Source
from grit_jax.data.tokenizer import Tokenizer

# To be raised whenever the files change their meaning or texts their tokens.
FORMAT_VERSION = 2

# A call of the tokenizer gets this much, so that its threads have work.
_BATCH_RECORDS = 1024
_BATCH_BYTES = 4 << 20
_RECORDS_A_SHARD = 100_000


class EmptySplitError(RecordError):
  """A split of a source has no record."""


class Dataset:
  """A tokenized data set on disk.

  Attributes:
    name: The source's name.
    kind: `records.EMBEDDING` or `records.GENERATIVE`.
    report: What was read, cut and dropped.
    record_ids: int64 [n], each record's number in the source.
    lengths: int32, numbers of tokens; see the subclasses.
  """

  kind: str

  def __init__(self, folder: pathlib.Path, source: Source, split: str):
    """Opens a data set that `prepare` wrote.

    Args:
      folder: Its folder.
      source: The source it was made of.
      split: The split of the source.
    """
    self.name = source.name
    self.report = Report(**json.loads((folder / 'report.json').read_text()))
    self.record_ids = _open_index(folder, 'record_ids')
    self.lengths = _open_index(folder, 'lengths')
    self._source = source
    self._split = split
    builder = tfds.builder_from_directory(folder / 'records')
    self._examples = builder.as_data_source('train')

  def __len__(self) -> int:
    """Number of records."""
    return len(self.record_ids)

  def where(self, index: int) -> str:
    """Names the place that a record came from, for messages.

    Args:
      index: The record's position in the data set.

    Returns:
      A place such as "data/a.jsonl:17".
    """
    return self._source.where(self._split, int(self.record_ids[index]))

  def _read(self, indices: Sequence[int]) -> Iterable[examples.Example]:
    return self._examples.__getitems__([int(index) for index in indices])


class EmbeddingDataset(Dataset):
  """A tokenized data set of embedding records.

  The texts of record i are texts `offsets[i]` to `offsets[i + 1]` of the data
  set: the query, then `num_positives[i]` positives, then the negatives.

  Attributes:
    offsets: int64 [n + 1], the first text of each record.
    lengths: int32 [texts], number of tokens of each text.
    num_positives: int32 [n], number of positives of each record.
    text_hashes: uint64 [texts], equal for equal texts, whatever their
      instructions.
  """

  kind = records.EMBEDDING

  def __init__(self, folder: pathlib.Path, source: Source, split: str):
    """See the base class."""
    super().__init__(folder, source, split)
    self.offsets = _open_index(folder, 'offsets')
    self.num_positives = _open_index(folder, 'num_positives')
    self.text_hashes = _open_index(folder, 'text_hashes')

  def read(self, indices: Sequence[int]) -> list[list[EmbeddingText]]:
    """Reads records.

    Args:
      indices: Positions in the data set, in any order.

    Returns:
      For each the query, the positives and the negatives, in one list.
    """
    return [examples.decode_embedding(item) for item in self._read(indices)]


class GenerativeDataset(Dataset):
  """A tokenized data set of conversations and plain texts.

  Attributes:
    lengths: int32 [n], number of tokens of each record.
    loss_tokens: int32 [n], number of them in the loss, at least one.
  """

  kind = records.GENERATIVE

  def __init__(self, folder: pathlib.Path, source: Source, split: str):
    """See the base class."""
    super().__init__(folder, source, split)
    self.loss_tokens = _open_index(folder, 'loss_tokens')

  def read(self, indices: Sequence[int]) -> list[Conversation]:
    """Reads records.

    Args:
      indices: Positions in the data set, in any order.

    Returns:
      The conversation of each.
    """
    return [examples.decode_conversation(item) for item in self._read(indices)]


def prepare(
  source: Source,
  split: str,
  tokenizer: Tokenizer,
  directory: str | os.PathLike,
  *,
  max_query_tokens: int,
  max_passage_tokens: int,
  max_generative_tokens: int,
  min_negatives: int,
  held_out_fraction: float,
) -> EmbeddingDataset | GenerativeDataset:
  """Opens the tokenized data set of a source, and makes it where it is missing.

  Every record is validated. The data set appears in the directory whole or
  not at all; a second process that prepares it waits for the first.

  Args:
    source: Where the records come from.
    split: `sources.TRAIN` or `sources.HELD_OUT`.
    tokenizer: The tokenizer.
    directory: Where tokenized data sets lie: a folder on a local or mounted
      disk, since the index is mapped into memory.
    max_query_tokens: Tokens of a query, prefix included; more are cut.
    max_passage_tokens: Tokens of a positive or negative.
    max_generative_tokens: Tokens of a conversation or plain text.
    min_negatives: Negatives that every embedding record must have.
    held_out_fraction: Share of a file's lines that is held out.

  Returns:
    The data set, of the class for the source's kind.

  Raises:
    RecordError: A record is malformed, cannot be formatted or has too few
      negatives, the message beginning with its place; or none is left.
    ValueError: The directory is not on a disk.
  """
  if '://' in os.fspath(directory):
    raise ValueError(
      f'{directory}: tokenized data sets need a folder on a local or mounted '
      'disk'
    )
  if source.kind == records.GENERATIVE:
    encoder = GenerativeEncoder(tokenizer, max_generative_tokens)
  else:
    encoder = EmbeddingEncoder(
      tokenizer, max_query_tokens, max_passage_tokens, min_negatives
    )
  identity = {
    'format': FORMAT_VERSION,
    'source': source.fingerprint(),
    'tokenizer': tokenizer.fingerprint,
    'limits': encoder.limits,
    'held_out_fraction': held_out_fraction,
  }
  text = json.dumps(identity, sort_keys=True)
  fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
  place = pathlib.Path(directory) / f'{source.name}-{split}'
  folder = place.with_name(f'{place.name}-{fingerprint}')
  with _lock(place), _temporary_folder(place) as temporary:
    if not folder.exists():
      _write(temporary, source, split, encoder, held_out_fraction)
      temporary.rename(folder)
  if source.kind == records.GENERATIVE:
    return GenerativeDataset(folder, source, split)
  dataset = EmbeddingDataset(folder, source, split)
  # Fewer may have been asked for when it was written.
  negatives = np.diff(dataset.offsets) - 1 - dataset.num_positives
  fewest = int(negatives.argmin())
  examples.check_negatives(
    int(negatives[fewest]), min_negatives, dataset.where(fewest)
  )
  return dataset


def _write(
  folder: pathlib.Path,
  source: Source,
  split: str,
  encoder: EmbeddingEncoder | GenerativeEncoder,
  held_out_fraction: float,
) -> None:
  (folder / 'records').mkdir(parents=True)
  writer = _open_writer(folder / 'records', encoder.features)
  record_ids = array.array('q')
  for lines in _batch_lines(source.read(split, held_out_fraction)):
    batch = [source.parse(split, number, line) for number, line in lines]
    places = [source.where(split, number) for number, _ in lines]
    encoded = encoder.encode(batch, places)
    kept = [i for i, example in enumerate(encoded) if example is not None]
    record_ids.extend(lines[i][0] for i in kept)
    writer.add_examples({'train': [encoded[i] for i in kept]})
  writer.close_all()
  if not record_ids:
    raise EmptySplitError(
      f'{source}: no record for split {split!r} with a held-out fraction of '
      f'{held_out_fraction}; dropped: {encoder.report.dropped or "none"}'
    )
  encoder.report.records = len(record_ids)
  index = {**encoder.index, 'record_ids': record_ids}
  for name, values in index.items():
    np.save(folder / f'{name}.npy', np.asarray(values))
  report = asdict(encoder.report)
  (folder / 'report.json').write_text(json.dumps(report, indent=2))
  logging.info('Tokenized %s, split %s: %s', source, split, report)


def _open_writer(
  folder: pathlib.Path, features: dict[str, tfds.features.FeatureConnector]
) -> tfds.core.SequentialWriter:
  identity = dataset_info.DatasetIdentity(
    name='tokens',
    version=tfds.core.Version(f'{FORMAT_VERSION}.0.0'),
    data_dir=os.fspath(folder),
    module_name=__name__,
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    features=tfds.features.FeaturesDict(features),
    disable_shuffling=True,
  )
  writer = tfds.core.SequentialWriter(
    info, max_examples_per_shard=_RECORDS_A_SHARD, file_format='array_record'
  )
  writer.initialize_splits(['train'])
  return writer


def _batch_lines(
  lines: Iterable[tuple[int, bytes]],
) -> Iterator[list[tuple[int, bytes]]]:
  batch: list[tuple[int, bytes]] = []
  size = 0
  for number, line in lines:
    batch.append((number, line))
    size += len(line)
    if len(batch) == _BATCH_RECORDS or size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _open_index(folder: pathlib.Path, name: str) -> np.ndarray:
  return np.load(folder / f'{name}.npy', mmap_mode='r')


@contextlib.contextmanager
def _lock(place: pathlib.Path) -> Iterator[None]:
  """Holds the right to write; the system takes it back if the process dies."""
  place.parent.mkdir(parents=True, exist_ok=True)
  with open(place.with_name(f'.{place.name}.lock'), 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def _temporary_folder(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """Names a folder to write in; what was left in it before and after goes."""
  temporary = place.with_name(f'{place.name}.incomplete')
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    yield temporary
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
