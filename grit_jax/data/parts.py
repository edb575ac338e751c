"""Parts of a source: runs of its records, each tokenized and written by itself.

Where a source is cut depends on its content alone. A part becomes a folder
that appears whole or not at all, so that a preparation that was interrupted
goes on from those that are there:

- `{split}.array_record`: the examples of a split of the source;
- `{split}-{name}.npy`: their index;
- `ids.npy`: the records that have an id;
- `part.json`: what else `grit_jax.data.merging` needs.
"""

import array
import contextlib
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from grit_jax.data import examples, records
from grit_jax.data.examples import EmbeddingEncoder, Example, GenerativeEncoder
from grit_jax.data.records import DUPLICATE_ID, Record, RecordError
from grit_jax.data.reports import check_split
from grit_jax.data.sources import HELD_OUT, TRAIN, Line, Source
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.files import (
  check_keys,
  new_folder,
  read_json,
  writing,
)

# Small enough to hold a few for each core, and for a start after a kill to lose
# seconds; large enough for shards that are no burden.
PART_BYTES = 16 << 20
PART_RECORDS = 1 << 16

SPLITS = (TRAIN, HELD_OUT)
IDS = np.dtype([('hash', 'u8'), ('split', 'u1'), ('number', 'i8')])

# A call of the tokenizer gets this much, so that its threads have work.
_BATCH_RECORDS = 1024
_BATCH_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is asked of data; see `grit_jax.data.dataset.prepare`."""

  max_query_tokens: int
  max_passage_tokens: int
  max_generative_tokens: int
  min_negatives: int
  held_out_fraction: float
  on_error: str
  max_skipped_fraction: float

  def limits(self, kind: str) -> dict[str, int]:
    """Returns what decides which tokens a record of a kind gets."""
    if kind == records.GENERATIVE:
      return {'generative': self.max_generative_tokens}
    return {'query': self.max_query_tokens, 'passage': self.max_passage_tokens}

  def make_encoder(
    self, kind: str, tokenizer: Tokenizer, num_threads: int
  ) -> EmbeddingEncoder | GenerativeEncoder:
    """Returns what encodes the records of a kind."""
    if kind == records.GENERATIVE:
      return GenerativeEncoder(
        tokenizer, self.max_generative_tokens, num_threads
      )
    return EmbeddingEncoder(
      tokenizer,
      self.max_query_tokens,
      self.max_passage_tokens,
      self.min_negatives,
      num_threads,
    )


@dataclasses.dataclass
class Part:
  """A run of a source's records.

  Attributes:
    index: its number in the source, from 0.
    lines: the records.
    size: bytes of them.
    checksum: CRC-32 of them.
    position: of the last one.
  """

  index: int
  lines: list[Line] = dataclasses.field(default_factory=list)
  size: int = 0
  checksum: int = 0
  position: int = 0


@dataclasses.dataclass(frozen=True)
class PartTask:
  """What a process needs to write a part.

  Attributes:
    part: the part.
    folder: what it is to be.
    kind: of the source.
    places: for each split what `Source.place` gives.
    excluded: of records that are to be skipped, by split and number: why.
  """

  part: Part
  folder: pathlib.Path
  kind: str
  places: Mapping[str, tuple[str, str]]
  excluded: Mapping[tuple[str, int], str]

  def where(self, line: Line) -> str:
    """Names the place of a record, as the source does."""
    before, after = self.places[line.split]
    return f'{before}{line.number}{after}'

  def parse(self, line: Line) -> Record | RecordError:
    """Returns a record, or what is wrong with it."""
    if (line.split, line.number) in self.excluded:
      message = self.excluded[line.split, line.number]
      return RecordError(message, DUPLICATE_ID)
    try:
      return records.parse(line.json, self.where(line), self.kind)
    except RecordError as error:
      return error


def cut(source: Source, held_out_fraction: float) -> Iterator[Part]:
  """Cuts a source into parts, the last of which may be small."""
  part = Part(0)
  for line in source.read(held_out_fraction):
    if part.size >= PART_BYTES or len(part.lines) >= PART_RECORDS:
      yield part
      part = Part(part.index + 1)
    part.lines.append(line)
    part.size += len(line.json)
    part.checksum = zlib.crc32(line.json, part.checksum)
    part.position = line.position
  if part.lines:
    yield part


def read_part(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what `part.json` of a part says.

  Raises:
    UserError: It is missing or damaged; the message names the file and the key.
  """
  path = folder / 'part.json'
  content = read_json(path, made_of=list, splits=dict)
  check_keys(
    content['splits'], f'{path}: splits', **dict.fromkeys(SPLITS, dict)
  )
  for name, split in content['splits'].items():
    check_split(split, f'{path}: splits: {name}')
    check_keys(split, f'{path}: splits: {name}', bytes=int)
  return content


def is_written(folder: pathlib.Path, part: Part) -> bool:
  """Says whether a part is there, made of the same records."""
  return folder.exists() and read_part(folder)['made_of'] == [
    len(part.lines),
    part.checksum,
  ]


def write_part(
  task: PartTask,
  tokenizer: Tokenizer,
  settings: Settings,
  num_threads: int,
) -> None:
  """Tokenizes and writes a part.

  Args:
    task: the part.
    tokenizer: the tokenizer.
    settings: what is asked of the data.
    num_threads: of the tokenizer; -1 for one a core.

  Raises:
    RecordError: on_error is `stop`, and a record is faulty; the first one of
      the part.
    UserError: the disk is full.
  """
  with (
    writing(task.folder.parent.parent),
    new_folder(task.folder) as partial,
  ):
    writer = _PartWriter(partial, task, tokenizer, settings, num_threads)
    for lines in _batch(task.part.lines):
      writer.add(lines)
    writer.close()


class _PartWriter:
  """Writes the files of a part."""

  def __init__(
    self,
    folder: pathlib.Path,
    task: PartTask,
    tokenizer: Tokenizer,
    settings: Settings,
    num_threads: int,
  ):
    self._folder, self._task = folder, task
    self._stop = settings.on_error == 'stop'
    self._splits = {
      split: _SplitWriter(
        folder, split, settings.make_encoder(task.kind, tokenizer, num_threads)
      )
      for split in SPLITS
    }
    self._ids: list[tuple[int, int, int]] = []

  def add(self, lines: list[Line]) -> None:
    """Encodes and writes some records.

    Raises:
      RecordError: See `write_part`.
    """
    results: list[Any] = [self._task.parse(line) for line in lines]
    parsed = list(results)
    for split, writer in self._splits.items():
      sound = [
        i
        for i, line in enumerate(lines)
        if line.split == split and not isinstance(results[i], RecordError)
      ]
      encoded = writer.encode(
        [results[i] for i in sound],
        [self._task.where(lines[i]) for i in sound],
      )
      for i, result in zip(sound, encoded, strict=True):
        results[i] = result
    for line, record, result in zip(lines, parsed, results, strict=True):
      writer = self._splits[line.split]
      if isinstance(result, RecordError):
        if self._stop:
          raise result
        writer.encoder.report.count_skipped(result)
      elif result is not None:
        writer.write(line.number, result)
        if record.id is not None:
          code = SPLITS.index(line.split)
          hashed = examples.hash_text(record.id)
          self._ids.append((hashed, code, line.number))

  def close(self) -> None:
    """Writes what is known at the end."""
    np.save(self._folder / 'ids.npy', np.array(self._ids, IDS))
    part = self._task.part
    content = {
      'made_of': [len(part.lines), part.checksum],
      'splits': {
        split: writer.close() for split, writer in self._splits.items()
      },
    }
    (self._folder / 'part.json').write_text(json.dumps(content))


class _SplitWriter:
  """Writes the records of one split in a part."""

  def __init__(
    self,
    folder: pathlib.Path,
    split: str,
    encoder: EmbeddingEncoder | GenerativeEncoder,
  ):
    self.encoder = encoder
    self._folder, self._split = folder, split
    self._features = tfds.features.FeaturesDict(encoder.features)
    self._serializer = example_serializer.ExampleSerializer(
      self._features.get_serialized_info()
    )
    self._path = folder / f'{split}.array_record'
    self._writer: array_record_module.ArrayRecordWriter | None = None
    self._bytes = 0
    self._record_ids = array.array('q')

  def encode(self, batch: list, places: list[str]) -> list[Any]:
    """Encodes records, if any."""
    return self.encoder.encode(batch, places) if batch else []

  def write(self, number: int, example: Example) -> None:
    """Writes an example."""
    proto = self._serializer.get_tf_example(
      self._features.encode_example(example)
    )
    # The order of the features would be another one in every process.
    serialized = proto.SerializeToString(deterministic=True)
    with _array_record_errors():
      if self._writer is None:
        # As TFDS does: records that are read at random, each by itself.
        self._writer = array_record_module.ArrayRecordWriter(
          os.fspath(self._path), 'group_size:1'
        )
      self._writer.write(serialized)
    self._bytes += len(serialized)
    self._record_ids.append(number)

  def close(self) -> dict[str, Any]:
    """Closes the file, writes the index and returns what else there is."""
    report = self.encoder.report
    report.records = len(self._record_ids)
    content = {'report': dataclasses.asdict(report), 'bytes': self._bytes}
    if self._writer is None:
      return content
    with _array_record_errors():
      self._writer.close()
      reader = array_record_module.ArrayRecordReader(os.fspath(self._path))
      found = reader.num_records()
      reader.close()
    if found != report.records:
      raise OSError(f'{found} of {report.records} records were written')
    index = {**self.encoder.index, 'record_ids': self._record_ids}
    arrays = {name: np.asarray(values) for name, values in index.items()}
    for name, values in arrays.items():
      np.save(self._folder / f'{self._split}-{name}.npy', values)
    if 'offsets' in arrays:
      texts = np.diff(arrays['offsets'])
      negatives = texts - 1 - arrays['num_positives']
      fewest = int(negatives.argmin())
      content['fewest_negatives'] = [
        int(negatives[fewest]),
        self._record_ids[fewest],
      ]
    return content


def _batch(lines: list[Line]) -> Iterator[list[Line]]:
  start = size = 0
  for i, line in enumerate(lines):
    if i - start >= _BATCH_RECORDS or size >= _BATCH_BYTES:
      yield lines[start:i]
      start, size = i, 0
    size += len(line.json)
  yield lines[start:]


@contextlib.contextmanager
def _array_record_errors() -> Iterator[None]:
  """Turns the errors of array_record's files into Python's."""
  try:
    yield
  except RuntimeError as error:
    # The cause alone, without where in the file.
    raise OSError(str(error).split(';')[0]) from error
