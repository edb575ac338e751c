"""Corpora: files of documents, and the indexes that are made of them.

A corpus is a `.jsonl`, `.jsonl.gz` or `.jsonl.zst` file, a document a line:
`{"text": ...}`, with a `title` or without, or the text alone as a JSON string.
An `id`, or `_id` as in BEIR, is a string or a number; a document without one is
called by its place in the file, from 0. Other fields are ignored.
"""

import array
import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from grit_jax import files
from grit_jax.data import records
from grit_jax.data.records import RecordError
from grit_jax.data.sources import TRAIN, FileSource
from grit_jax.errors import UserError
from grit_jax.inference.index import INDEX, Index
from grit_jax.inference.shards import Document, hash_id

# Where a corpus and a model lie: it may change while they do not.
_PLACES = ('input', 'model')
_HASHED, _FILES = '_sha256', '_files'

Embed = Callable[[Sequence[Document]], np.ndarray]


def parse_document(line: bytes, where: str, number: int) -> Document:
  """Reads one line of a corpus.

  Args:
    line: The line.
    where: Where it stands, such as "corpus.jsonl:17", for the message.
    number: The place of the document, from 0.

  Returns:
    `id`, `text` and, if it is not blank, `title`. The text may be blank.

  Raises:
    RecordError: The line is no document.
  """
  fields = records.parse_json(line, where)
  if isinstance(fields, str):
    fields = {'text': fields}
  if not isinstance(fields, dict):
    raise records.mismatch(where, 'the line', fields, 'an object or a string')
  if 'text' not in fields:
    raise RecordError(f'{where}: "text" is missing', records.WRONG_FIELDS)
  document = {
    'id': _parse_id(fields, where, number),
    'text': records.check_string(fields['text'], 'text', where, blank=True),
  }
  title = fields.get('title')
  if title is not None:
    title = records.check_string(title, 'title', where, blank=True)
    if title.strip():
      document['title'] = title
  return document


def _parse_id(fields: dict[str, Any], where: str, number: int) -> str:
  given = [name for name in ('id', '_id') if fields.get(name) is not None]
  if not given:
    return str(number)
  name, *others = given
  if others:
    raise RecordError(
      f'{where}: found both "id" and "_id", expected one', records.WRONG_FIELDS
    )
  value = fields[name]
  if isinstance(value, int | float) and not isinstance(value, bool):
    return json.dumps(value)
  if not isinstance(value, str):
    raise records.mismatch(where, name, value, 'a string or a number')
  return records.check_string(value, name, where)


def read_documents(
  source: FileSource, start: int = 0
) -> Iterator[tuple[str, Document]]:
  """Iterates over where each document stands, and the document.

  Args:
    source: The file.
    start: The place of the first one to give, from 0.
  """
  for line in source.read(held_out_fraction=0.0):
    if line.number > start:
      where = source.where(TRAIN, line.number)
      yield where, parse_document(line.json, where, line.number - 1)


def check_corpus(source: FileSource) -> int:
  """Reads a corpus once, so that a fault shows before hours of work.

  Returns:
    The number of its documents.

  Raises:
    RecordError: A line is no document, two have one id, or there is none.
  """
  hashes, blank = array.array('Q'), 0
  for _, document in read_documents(source):
    hashes.append(hash_id(document['id']))
    blank += not (document['text'].strip() or 'title' in document)
  if not hashes:
    raise RecordError(f'{source}: there are no documents in it')
  found, counts = np.unique(np.array(hashes), return_counts=True)
  if (counts > 1).any():
    _check_ids(source, set(found[counts > 1].tolist()))
  logging.info(
    '%s: %d documents, %d of them without any text.',
    source,
    len(hashes),
    blank,
  )
  return len(hashes)


def _check_ids(source: FileSource, hashes: set[int]) -> None:
  """Checks that among the ids of these hashes no two are equal."""
  places: dict[str, str] = {}
  for where, document in read_documents(source):
    name = document['id']
    if hash_id(name) in hashes and places.setdefault(name, where) != where:
      raise RecordError(
        f'{where}: the id {name!r} is also that of {places[name]}',
        records.DUPLICATE_ID,
      )


class CorpusWriter:
  """Embeds a corpus into an index, a shard after the other.

  Stopped at any time and made again, it goes on after the last whole shard, and
  what it writes is the same.

  Attributes:
    total: Number of documents of the corpus.
    done: Number of those in the index.
  """

  def __init__(
    self,
    source: FileSource,
    folder: str | os.PathLike,
    settings: dict[str, Any],
    dtype: str,
    shard_documents: int,
  ):
    """Checks all that can be checked before a model is there.

    Args:
      source: The corpus.
      folder: The index, which `writing_index` holds. It is new, or was begun
        with the same arguments.
      settings: What embeddings depend on, for the index's metadata. Where `X`
        is a path, `X_sha256` says whether it is the same.
      dtype: To store embeddings in.
      shard_documents: Number of documents of a shard.

    Raises:
      RecordError: The corpus is not what it must be.
      UserError: The folder was begun with something else.
    """
    self._source, self._folder = source, pathlib.Path(folder)
    self._dtype, self._shard_documents = dtype, shard_documents
    self._settings = describe(source, settings, shard_documents)
    self._index = open_begun(self._folder, self._settings, dtype)
    self.total = check_corpus(source)
    self.done = 0
    if self._index and len(self._index):
      self.done = min(len(self._index), self.total)
      _check_last(self._index, source, self.done)
      logging.info('%s: %d documents are there.', folder, self.done)

  def write(self, embed: Embed) -> None:
    """Embeds what is not done.

    Args:
      embed: Embeds documents, in order: float32 [N, D], of length 1 or 0.

    Raises:
      UserError: The disk is full.
      UserError: An embedding is not what it must be.
    """
    progress = tqdm(
      total=self.total,
      initial=self.done,
      desc=f'Embedding {self._source.name}',
      unit=' documents',
    )
    rest = read_documents(self._source, self.done)
    documents = (document for _, document in rest)
    with progress:
      while shard := list(itertools.islice(documents, self._shard_documents)):
        embeddings = np.asarray(embed(shard))
        if self._index is None:
          self._index = Index.create(
            self._folder,
            embeddings.shape[1],
            self._dtype,
            {**self._settings, 'documents': self.total},
          )
        self._index.extend(embeddings, shard)
        self.done += len(shard)
        progress.update(len(shard))


@contextlib.contextmanager
def writing_index(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Makes the folder of an index, and holds it against other commands.

  Raises:
    LockedError: Another command writes it.
    UserError: It cannot be written.
  """
  if not files.is_local(folder) or os.path.isfile(folder):
    raise UserError(f'{folder}: not a folder of a local or mounted disk')
  files.check_place(folder)
  path = pathlib.Path(folder)
  with files.writing(path):
    path.mkdir(parents=True, exist_ok=True)
  # An index has a lock of its own, for each shard.
  with files.lock(path / '.command.lock'):
    yield path


def describe(
  source: FileSource, settings: dict[str, Any], shard_documents: int
) -> dict[str, Any]:
  """Returns what the metadata of an index says of what made it.

  Args:
    source: The corpus.
    settings: See `CorpusWriter`.
    shard_documents: Number of documents of a shard.
  """
  return {
    'input': str(source),
    'input_sha256': source.fingerprint(),
    **settings,
    'shard_documents': shard_documents,
  }


def open_begun(
  folder: pathlib.Path, settings: dict[str, Any], dtype: str
) -> Index | None:
  """Opens what was begun, if it was begun with the same; None if nothing was.

  Args:
    folder: The index.
    settings: What `describe` returns.
    dtype: That embeddings are stored in.

  Raises:
    UserError: It was begun with something else.
  """
  if not (folder / INDEX).exists():
    return None
  index = Index.open(folder)
  begun = {**index.metadata, 'dtype': index.dtype}
  for name, value in {**settings, 'dtype': dtype}.items():
    found = begun.get(name)
    if name in _PLACES or found == value:
      continue
    if name.endswith(_FILES) and isinstance(found, dict):
      # Of another conversion, files have other names, and the same weights.
      if all(value[key] == found[key] for key in value.keys() & found.keys()):
        continue
    if name.endswith((_HASHED, _FILES)):
      what = name.removesuffix(_HASHED).removesuffix(_FILES)
      change = (
        f'another content of {what} ({begun.get(what)}) than '
        f'{settings[what]} has now'
      )
    else:
      change = f'{name}={found!r}, not {value!r}'
    raise UserError(
      f'{folder}: was begun with {change}. Ask for the same, or for another '
      'folder'
    )
  return index


def _check_last(index: Index, source: FileSource, done: int) -> None:
  """Checks that so many documents of the index are the corpus's first ones."""
  (last,) = index.documents([done - 1])
  where, expected = next(read_documents(source, done - 1))
  if last != expected:
    raise UserError(
      f'{index.folder}: document {done - 1} is {last["id"]!r}, not that of '
      f'{where}: it was extended with others before it was whole'
    )
