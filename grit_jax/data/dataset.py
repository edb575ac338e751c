"""Tokenized data sets: TFDS in array_record, with an index of lengths.

What lies in the folder of one is said in `grit_jax.data.merging`.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format

from grit_jax.config import DataConfig
from grit_jax.data import examples, records
from grit_jax.data.formats import Conversation, EmbeddingText
from grit_jax.data.merging import FORMAT, NAME, SHARD_TEMPLATE, make_features
from grit_jax.data.parts import SPLITS, Settings
from grit_jax.data.records import RecordError
from grit_jax.data.reports import Report, read_content
from grit_jax.data.sources import Source
from grit_jax.data.tokenization import tokenize
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.errors import UserError
from grit_jax.files import (
  check_file,
  check_keys,
  hash_json,
  load_json,
  read_json,
)


class EmptySplitError(RecordError):
  """A split of a source has no record."""


class Dataset:
  """A tokenized data set on disk.

  Attributes:
    name: The source's name.
    kind: `records.EMBEDDING` or `records.GENERATIVE`.
    report: What was read, cut, dropped and skipped.
    fingerprint: What tells its content from other data sets'.
    record_ids: int64 [n], each record's number in the source.
    lengths: int32, numbers of tokens; see the subclasses.
  """

  kind: str

  def __init__(self, folder: pathlib.Path, split: str):
    """Opens a split of a data set.

    Args:
      folder: The data set's folder.
      split: The split of the source.

    Raises:
      EmptySplitError: It has no record.
    """
    content = read_content(folder)
    self.name = content['name']
    self.report = Report(**content['splits'][split]['report'])
    self._place = content['splits'][split]['place']
    if not self.report.records:
      raise EmptySplitError(
        f'{content["source"]["name"]}: no record for split {split!r} with a '
        f'held-out fraction of {content["identity"]["held_out_fraction"]}; '
        f'dropped: {self.report.dropped or "none"}'
      )
    identity = {**content['identity'], 'records': self.report.records}
    self.fingerprint = hash_json(identity)
    self._folder, self._split = folder, split
    self.record_ids = self._open_index('record_ids')
    self.lengths = self._open_index('lengths')
    _check_records(folder / 'records', self.kind)
    builder = tfds.builder_from_directory(folder / 'records')
    self._examples = builder.as_data_source(split)

  def _open_index(self, name: str) -> np.ndarray:
    path = self._folder / f'{self._split}-{name}.npy'
    check_file(path)
    return np.load(path, mmap_mode='r')

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
    before, after = self._place
    return f'{before}{self.record_ids[index]}{after}'

  def _read(self, indices: Sequence[int]) -> Iterable[examples.Example]:
    return self._examples.__getitems__([int(index) for index in indices])


def _check_records(folder: pathlib.Path, kind: str) -> None:
  """Compares with what was written what TFDS trusts: classes, and files.

  TFDS imports the modules that `features.json` names.

  Raises:
    UserError: They are other ones; the message names the file.
  """
  path = folder / 'features.json'
  expected = make_features(kind).to_proto()
  if load_json(path) != json_format.MessageToDict(expected):
    raise UserError(
      f'{path}: not the features of tokenized {kind} records. Prepare the data '
      'again.'
    )
  path = folder / 'dataset_info.json'
  info = read_json(path, name=str, fileFormat=str, splits=list)
  found = [(info['name'], info['fileFormat'])]
  for number, split in enumerate(info['splits']):
    where = f'{path}: split {number}'
    check_keys(split, where, name=str, filepathTemplate=str, shardLengths=list)
    found.append((split['name'], split['filepathTemplate']))
  known = {(split, SHARD_TEMPLATE) for split in SPLITS}
  if found[0] != (NAME, FORMAT.value) or not known.issuperset(found[1:]):
    raise UserError(
      f'{path}: not of tokenized records. Prepare the data again.'
    )


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

  def __init__(self, folder: pathlib.Path, split: str):
    """See the base class."""
    super().__init__(folder, split)
    self.offsets = self._open_index('offsets')
    self.num_positives = self._open_index('num_positives')
    self.text_hashes = self._open_index('text_hashes')

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

  def __init__(self, folder: pathlib.Path, split: str):
    """See the base class."""
    super().__init__(folder, split)
    self.loss_tokens = self._open_index('loss_tokens')

  def read(self, indices: Sequence[int]) -> list[Conversation]:
    """Reads records.

    Args:
      indices: Positions in the data set, in any order.

    Returns:
      The conversation of each.
    """
    return [examples.decode_conversation(item) for item in self._read(indices)]


def open_dataset(
  folder: pathlib.Path, split: str
) -> EmbeddingDataset | GenerativeDataset:
  """Opens a split of a tokenized data set.

  Args:
    folder: What `grit_jax.data.tokenization.tokenize` returned.
    split: `sources.TRAIN` or `sources.HELD_OUT`.

  Returns:
    The data set, of the class for its kind.

  Raises:
    EmptySplitError: It has no record.
  """
  if read_content(folder)['kind'] == records.GENERATIVE:
    return GenerativeDataset(folder, split)
  return EmbeddingDataset(folder, split)


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
  on_error: str = DataConfig.on_error,
  max_skipped_fraction: float = DataConfig.max_skipped_fraction,
) -> EmbeddingDataset | GenerativeDataset:
  """Opens the tokenized data set of a source, and makes it where it is missing.

  Args:
    source: Where the records come from.
    split: `sources.TRAIN` or `sources.HELD_OUT`; both are made.
    tokenizer: The tokenizer.
    directory: Where tokenized data sets lie.
    max_query_tokens: Tokens of a query, prefix included; more are cut.
    max_passage_tokens: Tokens of a positive or negative.
    max_generative_tokens: Tokens of a conversation or plain text.
    min_negatives: Negatives that every embedding record must have.
    held_out_fraction: Share of a file's lines that is held out.
    on_error: What a faulty record does: `stop` raises, `skip` leaves it out
      and counts it. At fault is a record that is malformed, has too few
      negatives, an instruction that leaves no room for its text, or the id of
      an earlier one.
    max_skipped_fraction: Share of a source's records that may be skipped.

  Returns:
    The data set, of the class for the source's kind.

  Raises:
    EmptySplitError: It has no record.
    One of the errors of `grit_jax.data.tokenization.tokenize`.
  """
  settings = Settings(
    max_query_tokens,
    max_passage_tokens,
    max_generative_tokens,
    min_negatives,
    held_out_fraction,
    on_error,
    max_skipped_fraction,
  )
  (folder,) = tokenize([source], tokenizer, directory, settings)
  return open_dataset(folder, split)
