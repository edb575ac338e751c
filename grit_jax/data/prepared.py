"""Folders that `grit_jax.data.prepare` wrote.

Such a folder holds tokenized data sets, `prepared.json`, which names them and
what they were prepared with, and the tokenizer. It needs nothing else: not the
files that it was made of, nor a place.
"""

import dataclasses
import os
import pathlib
from typing import Any

from etils import epath

from grit_jax.data.examples import FORMAT_VERSION
from grit_jax.data.records import RecordError
from grit_jax.data.reports import read_content
from grit_jax.data.tokenizer import Tokenizer, load_tokenizer
from grit_jax.errors import UserError
from grit_jax.files import (
  check_keys,
  is_local,
  read_json,
  write_file,
  write_json,
  writing,
)

MANIFEST = 'prepared.json'
_TOKENIZER = 'tokenizer'


@dataclasses.dataclass(frozen=True)
class PreparedSource:
  """A data set in such a folder.

  Attributes:
    name: Of the source that it was made of.
    kind: Of its records.
    folder: Its folder.
    directory: The folder that it is in.
    tokenizer: The fingerprint of its tokenizer.
    settings: What it was prepared with: fields of
      `grit_jax.data.parts.Settings`.
  """

  name: str
  kind: str
  folder: pathlib.Path
  directory: pathlib.Path
  tokenizer: str
  settings: dict[str, Any]

  def __str__(self) -> str:
    """Gives the folder."""
    return str(self.folder)

  def load_tokenizer(self) -> Tokenizer:
    """Returns the tokenizer that it was prepared with."""
    return load_tokenizer(self.directory / _TOKENIZER)


def find_prepared(directory: epath.Path) -> list[PreparedSource]:
  """Finds the data sets of a folder.

  Args:
    directory: A folder.

  Returns:
    Its data sets, in the order they were named in; empty if it has no
    `prepared.json`.

  Raises:
    RecordError: It is of another version, or not on a disk.
    UserError: It is damaged; the message names the file and the key.
  """
  path = directory / MANIFEST
  if not path.exists():
    return []
  if not is_local(directory):
    raise RecordError(
      f'{directory}: prepared data is read from a local or mounted disk; copy '
      'it there'
    )
  content = read_json(
    path, format=int, tokenizer=str, settings=dict, data_sets=list
  )
  if content['format'] != FORMAT_VERSION:
    raise RecordError(
      f'{path}: found format {content["format"]}, expected {FORMAT_VERSION}; '
      'prepare the data again'
    )
  check_keys(
    content['settings'],
    f'{path}: settings',
    max_query_tokens=int,
    max_passage_tokens=int,
    max_generative_tokens=int,
    held_out_fraction=int | float,
  )
  found = []
  for number, data_set in enumerate(content['data_sets']):
    where = f'{path}: data set {number}'
    check_keys(data_set, where, name=str, kind=str, folder=str)
    if os.path.basename(data_set['folder']) != data_set['folder']:
      raise UserError(f'{where}: folder is {data_set["folder"]!r}, not a name.')
    folder = pathlib.Path(directory) / data_set['folder']
    written = read_content(folder)
    for name in 'name', 'kind':
      if written[name] != data_set[name]:
        raise UserError(
          f'{where}: {name} is {data_set[name]!r}, and {folder} has '
          f'{written[name]!r}.'
        )
    found.append(
      PreparedSource(
        data_set['name'],
        data_set['kind'],
        folder,
        pathlib.Path(directory),
        content['tokenizer'],
        content['settings'],
      )
    )
  return found


def write_prepared(
  directory: pathlib.Path,
  folders: list[pathlib.Path],
  tokenizer: Tokenizer,
  settings: dict[str, Any],
) -> None:
  """Makes a folder with tokenized data sets what `find_prepared` reads.

  Args:
    directory: The folder.
    folders: The data sets' folders in it.
    tokenizer: Their tokenizer.
    settings: See `PreparedSource`.
  """
  data_sets = []
  for folder in folders:
    content = read_content(folder)
    data_sets.append(
      {
        'name': content['name'],
        'kind': content['kind'],
        'folder': folder.name,
      }
    )
  content = {
    'format': FORMAT_VERSION,
    'tokenizer': tokenizer.fingerprint,
    'settings': settings,
    'data_sets': data_sets,
  }
  with writing(directory):
    # What was prepared before may have another tokenizer.
    (directory / MANIFEST).unlink(missing_ok=True)
    (directory / _TOKENIZER).mkdir(exist_ok=True)
    for name, data in tokenizer.files.items():
      write_file(directory / _TOKENIZER / name, data)
    write_json(directory / MANIFEST, content)
