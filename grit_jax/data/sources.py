"""Where records come from: JSON-lines files, folders of them, TFDS data sets.

A source is one data set: all its records are of one kind, and a batch of
embedding records comes from one source.
"""

import abc
import functools
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from grit_jax.data import records
from grit_jax.data.records import Record, RecordError

TRAIN = 'train'
HELD_OUT = 'held_out'

_SUFFIXES = ('.jsonl', '.jsonl.gz')
_TFDS_PREFIX = 'tfds:'
_TFDS_SPLITS = {TRAIN: 'train', HELD_OUT: 'test'}
# Large enough to read fast, small enough to hold.
_TFDS_BLOCK = 256


class Source(abc.ABC):
  """One data set of records.

  Attributes:
    name: A name that is unique among the sources of a run and can name a file.
  """

  name: str

  @functools.cached_property
  def kind(self) -> str:
    """The kind of the records, told by the first one.

    Raises:
      RecordError: There is no record, or the first one is malformed.
    """
    for split in TRAIN, HELD_OUT:
      for number, line in self.read(split, 0.0):
        record = records.parse(line, self.where(split, number))
        return records.kind_of(record)
    raise RecordError(f'{self}: there are no records in it')

  def parse(self, split: str, number: int, line: bytes) -> Record:
    """Parses a record of this source.

    Args:
      split: The split it was read from.
      number: Its number there, as `read` gave it.
      line: The line.

    Returns:
      The record.

    Raises:
      RecordError: It is malformed, or not of the source's kind.
    """
    where = self.where(split, number)
    record = records.parse(line, where)
    kind = records.kind_of(record)
    if kind != self.kind:
      raise RecordError(
        f'{where}: found a record of the {kind} kind among records of the '
        f'{self.kind} kind, expected one kind a data set'
      )
    return record

  @abc.abstractmethod
  def read(
    self, split: str, held_out_fraction: float
  ) -> Iterator[tuple[int, bytes]]:
    """Reads the records in order.

    Args:
      split: `TRAIN` or `HELD_OUT`.
      held_out_fraction: Share of a file's lines that are held out, in [0, 1);
        a line's content decides. A TFDS data set brings its own test split.

    Yields:
      The number of each record, for `where`, and its JSON as UTF-8.
    """

  @abc.abstractmethod
  def where(self, split: str, number: int) -> str:
    """Names the place of a record, such as "data/a.jsonl:17"."""

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Identifies the content of the source."""


class FileSource(Source):
  """The lines of a JSON-lines file, which may be compressed with gzip."""

  def __init__(self, path: epath.PathLike):
    """Names the file; nothing is read yet.

    Args:
      path: A `.jsonl` or `.jsonl.gz` file, local or gs://.

    Raises:
      RecordError: The name ends otherwise.
    """
    self._path = epath.Path(path)
    suffix = _suffix(self._path.name)
    if suffix is None:
      raise RecordError(f'{path}: expected a .jsonl or .jsonl.gz file')
    self.name = self._path.name.removesuffix(suffix)

  def __str__(self) -> str:
    """Gives the path."""
    return str(self._path)

  def read(
    self, split: str, held_out_fraction: float
  ) -> Iterator[tuple[int, bytes]]:
    """See the base class; numbers are line numbers from 1."""
    threshold = held_out_fraction * 2**32
    for number, line in enumerate(self._lines(), 1):
      line = line.rstrip(b'\r\n')
      if (zlib.crc32(line) < threshold) == (split == HELD_OUT):
        yield number, line

  def _lines(self) -> Iterator[bytes]:
    with self._path.open('rb') as file:
      if not self._path.name.endswith('.gz'):
        yield from file
        return
      try:
        with gzip.open(file) as lines:
          yield from lines
      except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f'{self}: not a whole gzip file: {error}') from error

  def where(self, split: str, number: int) -> str:
    """See the base class."""
    del split
    return f'{self._path}:{number}'

  def fingerprint(self) -> str:
    """The SHA-256 of the file, in hexadecimal."""
    digest = hashlib.sha256()
    with self._path.open('rb') as file:
      while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class TfdsSource(Source):
  """A TFDS data set whose examples have one text field, `json`."""

  def __init__(self, name: str, tfds_dir: epath.PathLike | None):
    """Names the data set; it is opened, or built, at first use.

    Args:
      name: TFDS's name, with the config where there are several.
      tfds_dir: TFDS's data folder; None for TFDS's default.
    """
    self._tfds_name = name
    self._tfds_dir = tfds_dir
    self.name = name.replace('/', '_').replace(':', '_')

  def __str__(self) -> str:
    """Gives the name as `sources` takes it."""
    return _TFDS_PREFIX + self._tfds_name

  @functools.cached_property
  def _builder(self) -> Any:
    import tensorflow_datasets as tfds

    try:
      # Of the formats that TFDS writes, the one it reads without TensorFlow.
      builder = tfds.builder(
        self._tfds_name, data_dir=self._tfds_dir, file_format='array_record'
      )
    except tfds.core.DatasetNotFoundError as error:
      raise RecordError(f'{self}: TFDS knows no such data set') from error
    builder.download_and_prepare()
    if 'json' not in builder.info.features:
      raise RecordError(
        f'{self}: found the features {sorted(builder.info.features)}, '
        'expected a text feature "json"'
      )
    return builder

  def read(
    self, split: str, held_out_fraction: float
  ) -> Iterator[tuple[int, bytes]]:
    """See the base class; numbers are positions in the split from 0."""
    del held_out_fraction
    name = _TFDS_SPLITS[split]
    if name not in self._builder.info.splits:
      return
    examples = self._builder.as_data_source(name)
    for start in range(0, len(examples), _TFDS_BLOCK):
      block = range(start, min(start + _TFDS_BLOCK, len(examples)))
      for number, example in zip(
        block, examples.__getitems__(list(block)), strict=True
      ):
        yield number, example['json']

  def where(self, split: str, number: int) -> str:
    """See the base class."""
    return f'{self}:{_TFDS_SPLITS[split]}[{number}]'

  def fingerprint(self) -> str:
    """TFDS's name, config and version, with the size of each split."""
    info = self._builder.info
    sizes = ','.join(
      f'{name}:{split.num_examples}:{int(split.num_bytes)}'
      for name, split in sorted(info.splits.items())
    )
    return f'{info.full_name} {sizes}'


def sources(paths: str, tfds_dir: epath.PathLike | None = None) -> list[Source]:
  """Finds the data sets that a string names.

  Args:
    paths: Entries separated by commas. Each is a `.jsonl` or `.jsonl.gz` file;
      a folder of them, each a data set; or `tfds:NAME[/CONFIG]`, a TFDS data
      set of JSON lines, which is built where it is missing. A TFDS data set
      with several configs, none of them named, is as many data sets.
    tfds_dir: TFDS's data folder; None for TFDS's default.

  Returns:
    The data sets, in the order of the entries and, in a folder, of the names.
    The first record of each has been read.

  Raises:
    FileNotFoundError: A path does not exist.
    RecordError: An entry holds no records, or two have one name.
  """
  found: list[Source] = []
  for entry in paths.split(','):
    entry = entry.strip()
    if not entry:
      raise RecordError(f'{paths!r}: found an empty entry, expected a path')
    if entry.startswith(_TFDS_PREFIX):
      found += _find_tfds(entry.removeprefix(_TFDS_PREFIX), tfds_dir)
    else:
      found += _find_files(epath.Path(entry))
  by_name: dict[str, Source] = {}
  for source in found:
    other = by_name.setdefault(source.name, source)
    if other is not source:
      raise RecordError(
        f'{source}: its name {source.name!r} is also that of {other}; a data '
        'set needs a name of its own'
      )
    # A source with nothing in it shows here, not in the middle of a run.
    _ = source.kind
  return found


def _find_files(path: epath.Path) -> list[Source]:
  if not path.exists():
    raise FileNotFoundError(f'{path}: there is no such file or folder')
  if not path.is_dir():
    return [FileSource(path)]
  files = sorted(
    (file for file in path.iterdir() if _suffix(file.name)),
    key=lambda file: file.name,
  )
  if not files:
    raise RecordError(f'{path}: there is no .jsonl or .jsonl.gz file in it')
  return [FileSource(file) for file in files]


def _find_tfds(name: str, tfds_dir: epath.PathLike | None) -> list[Source]:
  import tensorflow_datasets as tfds

  name, _, config = name.partition('/')
  if name == 'standard_library':
    # The import registers the data set with TFDS.
    import grit_jax.data.standard_library  # noqa: F401
  if config:
    return [TfdsSource(f'{name}/{config}', tfds_dir)]
  try:
    configs = tfds.builder_cls(name).builder_configs
  except tfds.core.DatasetNotFoundError:
    configs = {}  # It may still lie in tfds_dir, built by other code.
  if not configs:
    return [TfdsSource(name, tfds_dir)]
  return [TfdsSource(f'{name}/{config}', tfds_dir) for config in configs]


def _suffix(name: str) -> str | None:
  return next((s for s in _SUFFIXES if name.endswith(s)), None)
