"""The shards of an index: documents and their embeddings, in three files each.

- `embeddings-00000.npy`: [N, D], a row a document. NumPy has no bfloat16, so
  that is stored as the uint16 of its bits.
- `documents-00000.jsonl`: a line a document, `{"id": ..., "text": ..., ...}`.
- `offsets-00000.npy`: [N] with `end`, where the line ends in bytes, and `id`, a
  hash of the id, by which an id is found without the lines.

N documents, D model.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from grit_jax import files
from grit_jax.errors import UserError

# What embeddings may be stored in.
DTYPES = ('float32', 'bfloat16', 'float16')

# Rounding to bfloat16 takes a length from 1 by 2**-9 at most, and the model
# may have rounded before.
_UNIT_TOLERANCE = 1e-2
# Of the length that is stated: it is a bound, whatever the order of a sum.
_NORM_SLACK = 1 + 1e-9
_OFFSETS = np.dtype([('end', '<i8'), ('id', '<u8')])
# Rows that are checked at one time.
_CHECK_ROWS = 4096

Document = dict[str, Any]


class Shard:
  """The files of one shard; they are opened where they are read.

  Attributes:
    embeddings_path: Of its embeddings.
    documents_path: Of its documents.
    offsets_path: Of its offsets.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    number: int,
    index: dict[str, Any],
    stated: dict[str, Any] | None = None,
  ):
    """Names the files.

    Args:
      folder: Of the index.
      number: Of the shard.
      index: The fields of `index.json`.
      stated: Those of the shard: `rows`, `largest_norm`, and `sha256` of each
        file. None for a shard that is yet to be written.
    """
    self.embeddings_path = folder / f'embeddings-{number:05d}.npy'
    self.documents_path = folder / f'documents-{number:05d}.jsonl'
    self.offsets_path = folder / f'offsets-{number:05d}.npy'
    self._dimension = index['dimension']
    self._dtype = np.dtype(getattr(jnp, index['dtype']))
    self._unit_norm = index['unit_norm']
    self._stated = stated or {}

  @property
  def names(self) -> list[str]:
    """The names of its files."""
    paths = self.embeddings_path, self.documents_path, self.offsets_path
    return [path.name for path in paths]

  @property
  def _stored_dtype(self) -> np.dtype:
    bfloat16 = self._dtype == jnp.bfloat16
    return np.dtype(np.uint16) if bfloat16 else self._dtype

  @functools.cached_property
  def embeddings(self) -> np.ndarray:
    """The embeddings, mapped into memory: [N, D] in the index's dtype."""
    path = self.embeddings_path
    rows = self._map(path, self._stored_dtype, self._dimension)
    return rows.view(self._dtype)

  @functools.cached_property
  def _offsets(self) -> np.ndarray:
    return self._map(self.offsets_path, _OFFSETS)

  def _map(self, path: pathlib.Path, dtype: np.dtype, *axes: int) -> np.ndarray:
    files.check_file(path)
    try:
      found = np.load(path, mmap_mode='r')
    except (OSError, ValueError, EOFError) as error:
      raise UserError(f'{path}: cannot be read: {error}') from error
    expected = (self._stated['rows'], *axes)
    if found.shape != expected or found.dtype != dtype:
      raise UserError(
        f'{path}: found {found.dtype} {list(found.shape)}, expected {dtype} '
        f'{list(expected)}'
      )
    return found

  @functools.cached_property
  def sorted_ids(self) -> np.ndarray:
    """The hashes of the ids, uint64 [N], in ascending order."""
    return np.sort(self._offsets['id'])

  def rows_of(self, hashed: int) -> list[int]:
    """Returns the rows whose ids have this hash."""
    return np.flatnonzero(self._offsets['id'] == hashed).tolist()

  def read_document(self, row: int) -> Document:
    """Reads a document, and none of the others."""
    ends = self._offsets['end']
    start = int(ends[row - 1]) if row else 0
    files.check_file(self.documents_path)
    try:
      with open(self.documents_path, 'rb') as file:
        file.seek(start)
        return json.loads(file.read(int(ends[row]) - start))
    except (OSError, ValueError) as error:
      raise UserError(
        f'{self.documents_path}:{row + 1}: cannot be read: {error}'
      ) from error

  def to_lines(self, documents: Sequence[Document]) -> list[bytes]:
    """Returns the lines that documents are here.

    Raises:
      UserError: One is no document; the message names its line.
    """
    return [
      _to_line(document, f'{self.documents_path}:{number}')
      for number, document in enumerate(documents, 1)
    ]

  def write(
    self, embeddings: np.ndarray, lines: Sequence[bytes], ids: Sequence[str]
  ) -> dict[str, Any]:
    """Writes the files, each whole before it has its name.

    Args:
      embeddings: floating [N, D].
      lines: The documents, of `to_lines`.
      ids: Theirs.

    Returns:
      What is to be stated of the shard.

    Raises:
      UserError: An embedding is wrong; the message names its row.
    """
    with np.errstate(over='ignore'):  # It is found as not finite.
      embeddings = embeddings.astype(self._dtype)
    largest = self._check_rows(0, embeddings)
    offsets = np.empty(len(lines), _OFFSETS)
    offsets['end'] = np.cumsum([len(line) for line in lines])
    offsets['id'] = [hash_id(name) for name in ids]
    digests = {}
    for path, write in (
      (
        self.embeddings_path,
        lambda file: np.save(file, embeddings.view(self._stored_dtype)),
      ),
      (self.documents_path, lambda file: file.writelines(lines)),
      (self.offsets_path, lambda file: np.save(file, offsets)),
    ):
      with files.new_file(path) as file:
        write(file)
      digests[path.name] = files.hash_file(path)
    return {'rows': len(lines), 'largest_norm': largest, 'sha256': digests}

  def check(self) -> None:
    """Reads the files and compares them with what is stated of them.

    Raises:
      UserError: The first difference; the message names the file and,
        where there is one, the row or the line, both from 1.
    """
    largest = 0.0
    for start in range(0, self._stated['rows'], _CHECK_ROWS):
      rows = self.embeddings[start : start + _CHECK_ROWS]
      largest = max(largest, self._check_rows(start, rows))
    self._check_documents()
    for name, digest in self._stated['sha256'].items():
      path = self.documents_path.with_name(name)
      if files.hash_file(path) != digest:
        raise UserError(
          f'{path}: its SHA-256 is not what is stated: the file was changed, '
          'or is damaged'
        )
    if largest > self._stated['largest_norm'] * _NORM_SLACK:
      raise UserError(
        f'{self.embeddings_path}: an embedding has the length {largest:g}, '
        f'more than largest_norm={self._stated["largest_norm"]:g}'
      )

  def _check_rows(self, start: int, rows: np.ndarray) -> float:
    """Checks rows from `start`; returns a bound on their length."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    faults = [(~np.isfinite(norms), 'is not finite')]
    if self._unit_norm:
      off = (np.abs(norms - 1) > _UNIT_TOLERANCE) & (norms != 0)
      faults.append((off, 'does not have the length 1'))
    for wrong, fault in faults:
      if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
          f'{self.embeddings_path}: row {start + row + 1}: the embedding '
          f'{fault}: its length is {norms[row]:g} in {self._dtype}'
        )
    return float(norms.max()) * _NORM_SLACK

  def _check_documents(self) -> None:
    """Checks that the lines are documents, and where the offsets say."""
    path, expected = self.documents_path, self._offsets
    end = count = 0
    for line in _read_lines(path):
      end += len(line)
      count += 1
      try:
        document = json.loads(line)
      except ValueError as error:
        raise UserError(f'{path}:{count}: not JSON: {error}') from error
      _to_line(document, f'{path}:{count}')
      found = (end, hash_id(document['id']))
      if count <= len(expected) and expected[count - 1].item() != found:
        raise UserError(
          f'{path}:{count}: its end or its id is not that of row {count} of '
          f'{self.offsets_path}'
        )
    if count != len(expected):
      raise UserError(f'{path}: found {count} lines, expected {len(expected)}')


def hash_id(name: str) -> int:
  """Hashes an id to 64 bits; two may share a hash, so compare the ids too."""
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'little')


def _to_line(document: Document, where: str) -> bytes:
  """Returns a document as its line.

  Raises:
    UserError: It is no document; the message begins with `where`.
  """
  if not isinstance(document, dict):
    raise UserError(f'{where}: a document must be a dict')
  for name in 'id', 'text':
    if not isinstance(document.get(name), str):
      raise UserError(
        f'{where}: "{name}" is {document.get(name)!r}, expected a string'
      )
  try:
    line = json.dumps(document, ensure_ascii=False, allow_nan=False)
    return f'{line}\n'.encode()
  except (TypeError, ValueError) as error:
    raise UserError(f'{where}: not JSON in UTF-8: {error}') from error


def _read_lines(path: pathlib.Path) -> Iterator[bytes]:
  files.check_file(path)
  try:
    with path.open('rb') as file:
      yield from file
  except OSError as error:
    raise UserError(f'{path}: cannot be read: {error}') from error
