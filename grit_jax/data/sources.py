"""Where records come from: JSON-lines files, folders of them, TFDS data sets.

A source is one data set: all its records are of one kind, and a batch of
embedding records comes from one source.
"""

import abc
import functools
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grit_jax.data import lines, records
from grit_jax.data.prepared import PreparedSource, find_prepared
from grit_jax.data.records import RecordError
from grit_jax.errors import UserError
from grit_jax.files import check_file, check_place, is_local, load_json, lock

TRAIN = 'train'
HELD_OUT = 'held_out'

_TFDS_PREFIX = 'tfds:'
_TFDS_NAME = re.compile(r'\w+(/[\w.+-]+)?(:[\d.*]+)?')
_TFDS_SPLITS = {TRAIN: 'train', HELD_OUT: 'test'}
# Large enough to read fast, small enough to hold.
_TFDS_BLOCK = 256
# Of an example: what a record is made of, where it is not one feature `json`.
_TFDS_FIELDS = ('id', 'query', 'pos', 'neg', 'text')


class Line(NamedTuple):
  """A record that is read but not parsed.

  Attributes:
    split: `TRAIN` or `HELD_OUT`.
    number: Its number, for `Source.where`.
    json: Its JSON as UTF-8.
    position: How much of the source has been read with it, of `Source.size`.
  """

  split: str
  number: int
  json: bytes
  position: int


class Source(abc.ABC):
  """One data set of records.

  Attributes:
    name: A name that is unique among the sources of a run and can name a file.
  """

  name: str

  @functools.cached_property
  def kind(self) -> str:
    """The kind of the records, told by the first one that can be read.

    Raises:
      RecordError: There is none; the message names the first one's fault.
    """
    first_error = None
    for line in self.read(0.0):
      try:
        where = self.where(line.split, line.number)
        return records.kind_of(records.parse(line.json, where))
      except RecordError as error:
        first_error = first_error or error
    raise first_error or RecordError(f'{self}: there are no records in it')

  def where(self, split: str, number: int) -> str:
    """Names the place of a record, such as "data/a.jsonl:17"."""
    before, after = self.place(split)
    return f'{before}{number}{after}'

  @abc.abstractmethod
  def read(self, held_out_fraction: float) -> Iterator[Line]:
    """Reads the records in order.

    Args:
      held_out_fraction: Share of a file's lines that are held out, in [0, 1);
        a line's content decides. A TFDS data set brings its own test split.

    Yields:
      The records. The numbers of a split rise.
    """

  @abc.abstractmethod
  def place(self, split: str) -> tuple[str, str]:
    """Returns what stands before and after a record's number in its place."""

  @property
  @abc.abstractmethod
  def size(self) -> int:
    """What `Line.position` reaches at the end."""

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Identifies the content of the source."""

  @abc.abstractmethod
  def state(self) -> dict[str, Any]:
    """Returns what is cheap to know and changes when the content does."""


class FileSource(Source):
  """The lines of a JSON-lines file, which may be compressed."""

  def __init__(self, path: epath.PathLike):
    """Names the file; nothing is read yet.

    Args:
      path: A `.jsonl`, `.jsonl.gz` or `.jsonl.zst` file, local or gs://.

    Raises:
      RecordError: The name ends otherwise.
    """
    check_place(path)
    self._path = epath.Path(path)
    suffix = lines.suffix_of(self._path.name)
    if suffix is None:
      raise RecordError(f'{path}: expected a file {_list_suffixes()}')
    self.name = self._path.name.removesuffix(suffix)

  def __str__(self) -> str:
    """Gives the path."""
    return str(self._path)

  def read(self, held_out_fraction: float) -> Iterator[Line]:
    """See the base class; numbers are line numbers from 1."""
    threshold = held_out_fraction * 2**32
    read = enumerate(lines.read_lines(self._path), 1)
    for number, (line, position) in read:
      split = HELD_OUT if zlib.crc32(line) < threshold else TRAIN
      yield Line(split, number, line, position)

  def place(self, split: str) -> tuple[str, str]:
    """See the base class."""
    del split
    return f'{self._path}:', ''

  @property
  def size(self) -> int:
    """The file's size in bytes."""
    return self.state()['size']

  def fingerprint(self) -> str:
    """The SHA-256 of the file, in hexadecimal."""
    check_file(self._path)
    digest = hashlib.sha256()
    with self._path.open('rb') as file:
      while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()

  def state(self) -> dict[str, Any]:
    """The absolute path, the size, and the time of the last change."""
    path = os.fspath(self._path)
    if not is_local(path):
      found = self._path.stat()
      return {'path': path, 'size': found.length, 'changed': found.mtime}
    found = os.stat(path)
    return {
      'path': os.path.abspath(path),
      'size': found.st_size,
      'changed': found.st_mtime_ns,
    }


class TfdsSource(Source):
  """A TFDS data set whose examples are records.

  An example has a text feature `json`, a line; or features of the names of a
  record's fields: `query`, `pos` and `neg`, or `text`, each a text or a list of
  texts or, for pairs, a list of two texts each.
  """

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

  def _open_builder(self) -> Any:
    import tensorflow_datasets as tfds

    _check_features(self._tfds_name, self._tfds_dir)
    try:
      # Of the formats that TFDS writes, the one it reads without TensorFlow.
      return tfds.builder(
        self._tfds_name, data_dir=self._tfds_dir, file_format='array_record'
      )
    except tfds.core.DatasetNotFoundError as error:
      raise RecordError(f'{self}: TFDS knows no such data set') from error

  @functools.cached_property
  def _builder(self) -> Any:
    builder = self._open_builder()
    if not is_local(builder.data_dir):
      builder.download_and_prepare()
    else:
      # Of several processes one builds it; in the others TFDS would fail.
      place = pathlib.Path(builder.data_dir)
      place.parent.mkdir(parents=True, exist_ok=True)
      with lock(place.with_name(f'.{place.name}.lock'), wait=True):
        # Opened anew: another one may have built it meanwhile.
        builder = self._open_builder()
        builder.download_and_prepare()
    if not {'json', 'query', 'text'} & set(builder.info.features):
      raise RecordError(
        f'{self}: found the features {sorted(builder.info.features)}, '
        'expected a text feature "json", or "query", "pos" and "neg", or "text"'
      )
    return builder

  def read(self, held_out_fraction: float) -> Iterator[Line]:
    """See the base class; numbers are positions in the split from 0."""
    del held_out_fraction
    position = 0
    for split, name in _TFDS_SPLITS.items():
      if name not in self._builder.info.splits:
        continue
      examples = self._builder.as_data_source(name)
      for start in range(0, len(examples), _TFDS_BLOCK):
        block = range(start, min(start + _TFDS_BLOCK, len(examples)))
        for number, example in zip(
          block, examples.__getitems__(list(block)), strict=True
        ):
          position += 1
          yield Line(split, number, _to_json(example), position)

  def place(self, split: str) -> tuple[str, str]:
    """See the base class."""
    return f'{self}:{_TFDS_SPLITS[split]}[', ']'

  @property
  def size(self) -> int:
    """The number of examples."""
    splits = self._builder.info.splits
    return sum(
      splits[name].num_examples
      for name in _TFDS_SPLITS.values()
      if name in splits
    )

  def fingerprint(self) -> str:
    """TFDS's name, config and version, with the size of each split."""
    info = self._builder.info
    sizes = ','.join(
      f'{name}:{split.num_examples}:{int(split.num_bytes)}'
      for name, split in sorted(info.splits.items())
    )
    return f'{info.full_name} {sizes}'

  def state(self) -> dict[str, Any]:
    """The fingerprint, which is cheap."""
    return {'tfds': self.fingerprint()}


def _check_features(name: str, tfds_dir: epath.PathLike | None) -> None:
  """Refuses a data set on the disk that names code other than TFDS's own.

  TFDS imports the modules that a `features.json` names.

  Raises:
    UserError: One names other code; the message names the file.
  """
  from tensorflow_datasets.core.utils import file_utils

  for directory in file_utils.list_data_dirs(tfds_dir):
    folder = epath.Path(directory) / name.partition(':')[0]
    # Of the data set, a config, or a version.
    for place in '', '*/', '*/*/':
      for path in folder.glob(f'{place}features.json'):
        for module in _find_classes(load_json(path)):
          if not module.startswith('tensorflow_datasets.'):
            raise UserError(
              f'{path} names the class {module!r}, which TFDS would import; '
              'features of TFDS itself are read.'
            )


def _find_classes(value: Any) -> Iterator[str]:
  """Yields the classes that the JSON of features names."""
  if isinstance(value, dict):
    # A feature may itself be called so.
    named = (value.get(key) for key in ('pythonClassName', 'type'))
    yield from (name for name in named if isinstance(name, str))
  for item in value.values() if isinstance(value, dict) else value:
    if isinstance(item, dict | list):
      yield from _find_classes(item)


def _to_json(example: dict[str, Any]) -> bytes:
  """Returns an example of TFDS as the line that it stands for."""
  if 'json' in example:
    return example['json']
  fields = {
    name: _to_plain(example[name]) for name in _TFDS_FIELDS if name in example
  }
  return json.dumps(fields).encode()


def _to_plain(value: Any) -> Any:
  if isinstance(value, bytes):
    # What is not UTF-8 comes out as what the check of records refuses.
    return value.decode('utf-8', 'surrogateescape')
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
    return _to_plain(value) if isinstance(value, bytes | list) else value
  if isinstance(value, list):
    return [_to_plain(item) for item in value]
  return value


def sources(
  paths: str, tfds_dir: epath.PathLike | None = None
) -> list[Source | PreparedSource]:
  """Finds the data sets that a string names.

  Args:
    paths: Entries separated by commas. Each is a `.jsonl`, `.jsonl.gz` or
      `.jsonl.zst` file; a folder of them, each a data set; a folder that
      `grit_jax.data.prepare` wrote; or `tfds:NAME[/CONFIG]`, a TFDS data set
      (see `TfdsSource`), which is built where it is missing. A TFDS data set
      with several configs, none of them named, is as many data sets.
    tfds_dir: TFDS's data folder; None for TFDS's default.

  Returns:
    The data sets, in the order of the entries and, in a folder, of the names.
    A record of each that is not prepared has been read.

  Raises:
    FileNotFoundError: A path does not exist.
    RecordError: An entry holds no records, or two have one name.
  """
  found: list[Source | PreparedSource] = []
  for entry in paths.split(','):
    entry = entry.strip()
    if not entry:
      raise RecordError(f'{paths!r}: found an empty entry, expected a path')
    if entry.startswith(_TFDS_PREFIX):
      found += _find_tfds(entry.removeprefix(_TFDS_PREFIX), tfds_dir)
    else:
      check_place(entry)
      found += _find_files(epath.Path(entry))
  by_name: dict[str, Source | PreparedSource] = {}
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


def _find_files(path: epath.Path) -> Sequence[Source | PreparedSource]:
  if not path.exists():
    raise FileNotFoundError(f'{path}: there is no such file or folder')
  if not path.is_dir():
    return [FileSource(path)]
  prepared = find_prepared(path)
  if prepared:
    return prepared
  files = sorted(
    (file for file in path.iterdir() if lines.suffix_of(file.name)),
    key=lambda file: file.name,
  )
  if not files:
    raise RecordError(f'{path}: there is no file {_list_suffixes()} in it')
  return [FileSource(file) for file in files]


def _find_tfds(name: str, tfds_dir: epath.PathLike | None) -> list[Source]:
  import tensorflow_datasets as tfds

  if not _TFDS_NAME.fullmatch(name):
    raise RecordError(
      f'{_TFDS_PREFIX}{name}: expected {_TFDS_PREFIX}NAME[/CONFIG][:VERSION]'
    )
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


def _list_suffixes() -> str:
  *most, last = lines.SUFFIXES
  return f'{", ".join(most)} or {last}'
