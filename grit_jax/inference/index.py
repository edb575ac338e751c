"""An index: a folder with documents and their embeddings, for exact search.

The folder holds shards (see `grit_jax.inference.shards`) and `index.json`,
which names them, with the number of their rows and the SHA-256 of their files.
A shard belongs to the index once `index.json`, which is replaced as a whole,
names it: a process that is killed leaves the index as it was, and files that
the next shard overwrites.

A document's number is its row, counted over all shards. Q queries, N documents,
D model.
"""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from grit_jax import files
from grit_jax.errors import UserError
from grit_jax.inference import search
from grit_jax.inference.shards import DTYPES, Document, Shard, hash_id

INDEX = 'index.json'
VERSION = 1


class Index:
  """An index as it was when it was opened, or extended by this object.

  Attributes:
    folder: Its folder.
    dimension: Of an embedding.
    dtype: What embeddings are stored in, of `DTYPES`.
    unit_norm: Whether every embedding has the length 1, or is 0, as that of an
      empty text.
    metadata: What made the embeddings.
    largest_norm: What no embedding's length exceeds.
  """

  def __init__(self, folder: pathlib.Path, content: str):
    """Use `create` or `open`.

    Args:
      folder: Its folder.
      content: Of its `index.json`.
    """
    self.folder = folder
    self._take(content)

  def _take(self, content: str) -> None:
    self._content = content
    fields = _check_fields(json.loads(content), self.folder / INDEX)
    self.dimension: int = fields['dimension']
    self.dtype: str = fields['dtype']
    self.unit_norm: bool = fields['unit_norm']
    self.metadata: dict[str, Any] = fields['metadata']
    stated = fields['shards']
    self.largest_norm = max((s['largest_norm'] for s in stated), default=0.0)
    self._shards = [
      Shard(self.folder, number, fields, shard)
      for number, shard in enumerate(stated)
    ]
    # The number of each shard's first row, and the number of all.
    self._starts = np.cumsum([0, *(shard['rows'] for shard in stated)])

  @classmethod
  def create(
    cls,
    folder: str | os.PathLike,
    dimension: int,
    dtype: str = 'float32',
    metadata: dict[str, Any] | None = None,
    unit_norm: bool = True,
  ) -> 'Index':
    """Makes an index without documents.

    Args:
      folder: Where; it is made if it is not there.
      dimension: Of an embedding.
      dtype: To store embeddings in, of `DTYPES`.
      metadata: What made the embeddings; anything that JSON holds.
      unit_norm: See the class. Embeddings are held to it.

    Raises:
      UserError: There is an index, or such a one cannot be.
    """
    folder = pathlib.Path(folder)
    if (folder / INDEX).exists():
      raise UserError(f'{folder}: there is an index already')
    if dtype not in DTYPES:
      raise UserError(
        f'{folder}: dtype={dtype!r}, expected one of {", ".join(DTYPES)}'
      )
    if dimension < 1:
      raise UserError(f'{folder}: dimension={dimension} is not positive')
    fields = {
      'version': VERSION,
      'dimension': dimension,
      'dtype': dtype,
      'unit_norm': unit_norm,
      'documents': 0,
      'metadata': metadata or {},
      'shards': [],
    }
    with files.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      return cls(folder, _write_fields(folder, fields))

  @classmethod
  def open(cls, folder: str | os.PathLike) -> 'Index':
    """Opens an index; of its shards nothing is read yet.

    Raises:
      UserError: There is none, or one of another version.
    """
    folder = pathlib.Path(folder)
    path = folder / INDEX
    if not path.exists():
      raise UserError(f'{folder}: there is no index, no {INDEX}')
    version = files.read_json(path, version=int)['version']
    if version != VERSION:
      raise UserError(
        f'{path}: found version {version}, expected {VERSION}; make the index '
        'again'
      )
    return cls(folder, path.read_text())

  def __len__(self) -> int:
    """Returns the number of documents."""
    return int(self._starts[-1])

  def search(
    self, queries: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k documents with the largest inner products, exactly.

    It runs over the devices of the mesh in force, or on one, and the result is
    the same on all: see `grit_jax.inference.search`.

    Args:
      queries: floating [Q, D].
      k: How many; all documents where there are fewer.

    Returns:
      Scores, float32 [Q, k], the best first, and the documents' numbers, int64
      [Q, k], the lower first where scores are equal.
    """
    if k < 1:
      raise UserError(f'k is {k}; it must be 1 or more')
    if not len(self):
      raise UserError(f'{self.folder}: there are no documents in it')
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != self.dimension:
      raise UserError(
        f'queries has the shape {queries.shape}, expected [Q, {self.dimension}]'
      )
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
      raise UserError(f'query {np.argmin(finite)} is not finite')
    return search.search(self, queries, k)

  def documents(self, numbers: Sequence[int] | np.ndarray) -> list[Document]:
    """Reads the documents of these numbers, and no others."""
    numbers = self._check_numbers(numbers)
    return [
      self._shards[shard].read_document(number - self._starts[shard])
      for shard, number in zip(self._locate(numbers), numbers, strict=True)
    ]

  def embeddings(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Reads the embeddings of these documents, float32 [N, D]."""
    numbers = self._check_numbers(numbers)
    found = np.empty((len(numbers), self.dimension), np.float32)
    shards = self._locate(numbers)
    for shard in np.unique(shards):
      here = shards == shard
      rows = numbers[here] - self._starts[shard]
      found[here] = self._shards[shard].embeddings[rows]
    return found

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads the embeddings from one number to another, as stored.

    Returns:
      [N, D]; fewer where the index ends.
    """
    found = [np.empty((0, self.dimension), getattr(jnp, self.dtype))]
    for shard, first in zip(self._shards, self._starts.tolist(), strict=False):
      part = slice(max(start - first, 0), max(stop - first, 0))
      if part.start < part.stop:
        found.append(shard.embeddings[part])
    return np.concatenate(found)

  def extend(
    self, embeddings: np.ndarray, documents: Sequence[Document]
  ) -> None:
    """Adds documents, as one shard: all of them or, if interrupted, none.

    Args:
      embeddings: floating [N, D].
      documents: As many, each with an `id` that no other document has and a
        `text`, both strings, and what else JSON holds.

    Raises:
      UserError: The message names the file and the row, or the line,
        that would be wrong.
      UserError: The disk is full.
    """
    embeddings = np.asarray(embeddings)
    expected = (len(documents), self.dimension)
    if not len(documents) or embeddings.shape != expected:
      raise UserError(
        f'{self.folder}: embeddings of the shape {embeddings.shape} for '
        f'{len(documents)} documents, expected [documents, {self.dimension}] '
        'and one document or more'
      )
    with files.lock(self.folder / '.lock'):
      if (self.folder / INDEX).read_text() != self._content:
        raise UserError(
          f'{self.folder}: another process has extended it since it was opened '
          'here; open it again'
        )
      fields = json.loads(self._content)
      shard = Shard(self.folder, len(self._shards), fields)
      lines = shard.to_lines(documents)
      ids = [document['id'] for document in documents]
      self._check_ids(ids, shard.documents_path)
      with files.writing(self.folder):
        fields['shards'].append(shard.write(embeddings, lines, ids))
        fields['documents'] += len(documents)
        self._take(_write_fields(self.folder, fields))

  def check(self) -> None:
    """Reads all of it, and compares it with what is stated of it.

    Raises:
      UserError: The first difference; the message names the file and,
        where there is one, the row or the line, both from 1.
    """
    for shard in self._shards:
      shard.check()

  def _locate(self, numbers: np.ndarray) -> np.ndarray:
    """Returns the shards of documents, int64 [N]."""
    return np.searchsorted(self._starts, numbers, side='right') - 1

  def _check_numbers(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    numbers = np.asarray(numbers, np.int64)
    wrong = numbers[(numbers < 0) | (numbers >= len(self))]
    if wrong.size:
      raise UserError(
        f'{self.folder}: there is no document {wrong[0]}, of {len(self)}'
      )
    return numbers

  def _check_ids(self, ids: Sequence[str], path: pathlib.Path) -> None:
    """Checks that no id of a new shard is that of another document."""
    lines: dict[str, int] = {}
    for line, name in enumerate(ids, 1):
      if lines.setdefault(name, line) != line:
        raise UserError(
          f'{path}:{line}: the id {name!r} is also that of line {lines[name]}'
        )
    hashes = np.array([hash_id(name) for name in ids], np.uint64)
    for start, shard in zip(self._starts, self._shards, strict=False):
      places = np.searchsorted(shard.sorted_ids, hashes)
      places = np.minimum(places, len(shard.sorted_ids) - 1)
      for i in np.flatnonzero(shard.sorted_ids[places] == hashes):
        for row in shard.rows_of(hashes[i]):
          if shard.read_document(row)['id'] == ids[i]:
            raise UserError(
              f'{path}:{i + 1}: the id {ids[i]!r} is also that of document '
              f'{start + row}, {shard.documents_path}:{row + 1}'
            )


def _check_fields(fields: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """Checks what `index.json` says.

  Raises:
    UserError: It is damaged; the message names the file and the key.
  """
  files.check_keys(
    fields,
    str(path),
    dimension=int,
    dtype=str,
    unit_norm=bool,
    metadata=dict,
    shards=list,
  )
  if fields['dtype'] not in DTYPES:
    raise UserError(f'{path}: dtype is {fields["dtype"]!r}.')
  _check_size(fields, 'dimension', str(path))
  for number, shard in enumerate(fields['shards']):
    where = f'{path}: shard {number}'
    files.check_keys(
      shard, where, rows=int, largest_norm=int | float, sha256=dict
    )
    _check_size(shard, 'rows', where)
    if not 0 <= shard['largest_norm'] < math.inf:
      raise UserError(f'{where}: largest_norm is {shard["largest_norm"]}.')
    names = Shard(path.parent, number, fields).names
    hashes = files.check_keys(
      shard['sha256'], f'{where}: sha256', **dict.fromkeys(names, str)
    )
    if len(hashes) > len(names):
      raise UserError(f'{where}: sha256 names other files.')
  return fields


def _check_size(fields: dict[str, Any], key: str, where: str) -> None:
  if not 1 <= fields[key] < 2**31:
    raise UserError(f'{where}: {key} is {fields[key]}.')


def _write_fields(folder: pathlib.Path, fields: dict[str, Any]) -> str:
  """Replaces `index.json`; returns its content."""
  content = json.dumps(fields, indent=2) + '\n'
  files.write_file(folder / INDEX, content)
  return content
