"""Tests of the index: exact search, and a folder that is whole or says not."""

import itertools
import json
import math
import os
import pathlib
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from json_damage import check_every_damage_is_named

from grit_jax import files
from grit_jax.errors import UserError
from grit_jax.inference import search
from grit_jax.inference.index import Index

DIMENSION = 24
# Documents of each shard; blocks and devices end in the middle of them.
SHARDS = (50, 1, 97, 55)


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
  """Draws unit vectors, float32 [count, D]."""
  x = rng.standard_normal((count, DIMENSION)).astype(np.float32)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def number_documents(first: int, count: int) -> list[dict]:
  return [
    {'id': f'd{i}', 'text': f'Ein Text, der {i}.\n\u2028', 'title': 'ü' * i}
    for i in range(first, first + count)
  ]


def make_index(
  folder: pathlib.Path,
  embeddings: np.ndarray,
  shards: tuple[int, ...],
  dtype: str = 'float32',
  unit_norm: bool = True,
) -> Index:
  index = Index.create(folder, embeddings.shape[1], dtype, unit_norm=unit_norm)
  for count in shards:
    start = len(index)
    index.extend(
      embeddings[start : start + count], number_documents(start, count)
    )
  return index


def find_one_by_one(
  queries: np.ndarray, embeddings: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """The definition: exact sums, rounded once; ties by the lower number."""
  scores, numbers = [], []
  for query in queries:
    row = []
    for number, embedding in enumerate(embeddings):
      products = query.astype(np.float64) * embedding.astype(np.float64)
      row.append((-float(np.float32(math.fsum(products))), number))
    row = sorted(row)[:k]
    scores.append([-score for score, _ in row])
    numbers.append([number for _, number in row])
  return np.array(scores, np.float32), np.array(numbers, np.int64)


def check_found(index: Index, queries: np.ndarray, k: int, expected: tuple):
  scores, numbers = index.search(queries, k)
  assert scores.dtype == np.float32 and numbers.dtype == np.int64
  np.testing.assert_array_equal(numbers, expected[1])
  np.testing.assert_array_equal(scores, expected[0])


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)


@pytest.fixture
def tied(rng: np.random.Generator) -> np.ndarray:
  """Vectors of which most occur several times, or all but the last bit."""
  x = draw(rng, 40)[rng.integers(0, 40, sum(SHARDS))]
  nudged = rng.random(x.shape) < 0.02
  return np.where(nudged, np.nextafter(x, np.float32(1)), x)


@pytest.mark.parametrize(
  ('sizes', 'block_rows'),
  [(None, 4), ((1, 1, 1), 2048), ((8, 1, 1), 4), ((1, 4, 2), 2048)],
)
def test_search_is_the_definition_on_any_mesh_with_ties(
  tmp_path, rng, tied, mesh_of, monkeypatch, sizes, block_rows
):
  monkeypatch.setattr(search, 'BLOCK_ROWS', block_rows)
  monkeypatch.setattr(search, 'QUERY_BLOCK', 4)
  monkeypatch.setattr(search, 'EXACT_ROWS', 10)
  index = make_index(tmp_path, tied, SHARDS)
  queries = np.concatenate([draw(rng, 7), tied[:2]])
  expected = find_one_by_one(queries, tied, 10)
  if sizes is None:
    check_found(index, queries, 10, expected)
  else:
    with jax.set_mesh(mesh_of(*sizes)):
      check_found(index, queries, 10, expected)


def test_more_ties_than_candidates_are_found_by_number(
  tmp_path, rng, mesh_of, monkeypatch
):
  x = draw(rng, 203)
  x[3:150] = x[3]
  x[:3] = -x[3]
  index = make_index(tmp_path, x, SHARDS)
  queries = np.stack([x[3], x[180], np.zeros_like(x[0])])
  expected = find_one_by_one(queries, x, 3)
  check_found(index, queries, 3, expected)
  # Neighbours are on different devices.
  monkeypatch.setattr(search, 'BLOCK_ROWS', 1)
  with jax.set_mesh(mesh_of(8, 1, 1)):
    check_found(index, queries, 3, expected)


def test_no_document_is_lost_where_float32_scores_mislead(tmp_path, rng):
  # The scores are all but 0, of products that cancel: what float32 makes of
  # them is chance, and the order is in their sums alone.
  x = draw(rng, 203)
  query = rng.standard_normal(DIMENSION)
  away = query / np.linalg.norm(query)
  x = (x - (x @ away)[:, None] * away).astype(np.float32)
  index = make_index(tmp_path, x, SHARDS, unit_norm=False)
  queries = query[None].astype(np.float32)
  check_found(index, queries, 3, find_one_by_one(queries, x, 3))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_smaller_dtype_is_searched_as_it_is_stored(tmp_path, rng, dtype):
  x = draw(rng, 40)
  index = make_index(tmp_path, x, (30, 10), dtype)
  stored = x.astype(getattr(jnp, dtype)).astype(np.float32)
  assert (stored != x).any()
  index = Index.open(tmp_path)
  index.check()
  np.testing.assert_array_equal(index.embeddings(range(40)), stored)
  queries = draw(rng, 3)
  check_found(index, queries, 5, find_one_by_one(queries, stored, 5))


def test_all_documents_are_found_where_there_are_fewer_than_k(tmp_path, rng):
  x = draw(rng, 5)
  index = make_index(tmp_path, x, (5,))
  queries = draw(rng, 2)
  check_found(index, queries, 9, find_one_by_one(queries, x, 5))


def test_few_shapes_are_compiled(tmp_path, rng):
  index = make_index(tmp_path, draw(rng, 203), SHARDS)
  index.search(draw(rng, 8), 10)
  before = search._update._cache_size()
  for queries, k in ((5, 10), (6, 16), (7, 9)):
    index.search(draw(rng, queries), k)
  assert search._update._cache_size() == before


def test_wrong_queries_are_refused(tmp_path, rng):
  index = Index.create(tmp_path, DIMENSION)
  with pytest.raises(UserError, match='no documents'):
    index.search(draw(rng, 1), 1)
  index.extend(draw(rng, 2), number_documents(0, 2))
  with pytest.raises(ValueError, match='k is 0'):
    index.search(draw(rng, 1), 0)
  with pytest.raises(ValueError, match=r'shape \(24,\), expected \[Q, 24\]'):
    index.search(draw(rng, 1)[0], 1)
  queries = draw(rng, 3)
  queries[1, 5] = np.nan
  with pytest.raises(ValueError, match='query 1 is not finite'):
    index.search(queries, 1)
  with pytest.raises(ValueError, match='overflow'):
    index.search(np.full((1, DIMENSION), 3e38), 1)


def test_embeddings_are_a_memory_map_that_numpy_reads(tmp_path, rng):
  x = draw(rng, 7)
  make_index(tmp_path, x, (5, 2))
  index = Index.open(tmp_path)
  for number, part in enumerate((x[:5], x[5:])):
    mapped = np.load(tmp_path / f'embeddings-{number:05d}.npy', mmap_mode='r')
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, part)
  np.testing.assert_array_equal(index.rows(3, 99), x[3:])
  np.testing.assert_array_equal(index.embeddings([6, 0, 4]), x[[6, 0, 4]])
  assert all(isinstance(s.embeddings, np.memmap) for s in index._shards)


def test_a_document_is_read_without_the_others(tmp_path, rng):
  make_index(tmp_path, draw(rng, 203), SHARDS)
  index = Index.open(tmp_path)
  numbers = [202, 0, 50, 49, 51, 0]
  expected = [number_documents(i, 1)[0] for i in numbers]
  assert index.documents(numbers) == expected
  # What stands before and after it is not even looked at.
  path = tmp_path / 'documents-00002.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  lines[9:12] = [b'\xff' * len(lines[9]), lines[10], b'{' * len(lines[11])]
  path.write_bytes(b''.join(lines))
  assert index.documents([61]) == number_documents(61, 1)
  for number in -1, 203:
    with pytest.raises(UserError, match=f'no document {number}, of 203'):
      index.documents([number])


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    path.name: path.read_bytes()
    for path in folder.iterdir()
    if path.name != '.lock'
  }


# Of each of four files: its content, then the folder's names. When the last of
# them is written, the index is whole already.
@pytest.mark.parametrize(
  'call, writes',
  [*(('fsync', i) for i in range(7)), *(('replace', i) for i in range(4))],
)
def test_an_interrupted_extension_leaves_the_index_as_it_was(
  tmp_path, rng, monkeypatch, call, writes
):
  x = draw(rng, 30)
  make_index(tmp_path / 'whole', x, (20, 10))
  folder = tmp_path / 'index'
  index = make_index(folder, x, (20,))
  place = os if call == 'fsync' else pathlib.Path
  original, calls = getattr(place, call), itertools.count()

  def interrupt(file: int | pathlib.Path, *arguments):
    if next(calls) < writes:
      return original(file, *arguments)
    if call == 'fsync' and stat.S_ISREG(os.fstat(file).st_mode):
      os.ftruncate(file, 5)  # What a machine that stops may leave of it.
    raise KeyboardInterrupt

  with monkeypatch.context() as context:
    context.setattr(place, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
      index.extend(x[20:], number_documents(20, 10))
  assert len(index) == 20
  index = Index.open(folder)
  assert len(index) == 20
  index.check()
  index.extend(x[20:], number_documents(20, 10))
  assert files_of(folder) == files_of(tmp_path / 'whole')


def test_of_two_that_extend_one_is_refused(tmp_path, rng):
  first = Index.create(tmp_path / 'index', DIMENSION)
  second = Index.open(tmp_path / 'index')
  with files.lock(tmp_path / 'index' / '.lock'):
    with pytest.raises(UserError, match=f'process {os.getpid()} on '):
      first.extend(draw(rng, 1), number_documents(0, 1))
  second.extend(draw(rng, 1), number_documents(0, 1))
  with pytest.raises(UserError, match='open it again'):
    first.extend(draw(rng, 1), number_documents(1, 1))
  assert len(Index.open(tmp_path / 'index')) == 1


def change(x: np.ndarray, row: int, value: float) -> np.ndarray:
  x = x.copy()
  x[row] *= value
  return x


@pytest.mark.parametrize(
  ('documents', 'edit', 'fault'),
  [
    (['a', 'b', 'a'], None, r"documents-00001.jsonl:3: .* 'a' .* of line 1$"),
    (
      ['a', 'b', 'd1'],
      None,
      r"documents-00001.jsonl:3: the id 'd1' is also that of document 1, "
      r'.*documents-00000.jsonl:2$',
    ),
    (['a', 'b', 3], None, r'documents-00001.jsonl:3: "id" is 3, expected a st'),
    (['a', 'b', '\ud800'], None, r'documents-00001.jsonl:3: not JSON in UTF-8'),
    (['a', 'b'], None, r'shape \(3, 24\) for 2 documents'),
    (
      ['a', 'b', 'c'],
      (1, np.nan),
      r'embeddings-00001.npy: row 2: the embedding is not finite',
    ),
    (
      ['a', 'b', 'c'],
      (2, 1.05),
      r'embeddings-00001.npy: row 3: .* length 1: its length is 1.05 in float',
    ),
  ],
)
def test_what_must_not_be_added_is_named(tmp_path, rng, documents, edit, fault):
  index = make_index(tmp_path, draw(rng, 2), (2,))
  x = draw(rng, 3)
  with pytest.raises(UserError, match=fault):
    index.extend(
      change(x, *edit) if edit else x,
      [{'id': name, 'text': ''} for name in documents],
    )
  assert len(index) == len(Index.open(tmp_path)) == 2


def test_ids_of_one_hash_are_told_apart(tmp_path, rng, monkeypatch):
  for module in 'shards', 'index':
    monkeypatch.setattr(
      f'grit_jax.inference.{module}.hash_id', lambda name: len(name)
    )
  index = make_index(tmp_path, draw(rng, 5), (2, 3))
  index.check()
  with pytest.raises(UserError, match="'d1' is also that of document 1"):
    index.extend(draw(rng, 2), [{'id': i, 'text': ''} for i in ('x1', 'd1')])


def test_the_embedding_of_an_empty_text_may_be_zero(tmp_path, rng):
  x = change(draw(rng, 5), 3, 0)
  index = make_index(tmp_path, x, (5,))
  index.check()
  check_found(index, -x[:2], 5, find_one_by_one(-x[:2], x, 5))


def test_a_length_is_free_where_none_is_stated(tmp_path, rng):
  x = 300 * draw(rng, 30)
  index = make_index(tmp_path, x, (20, 10), unit_norm=False)
  index.check()
  check_found(index, x[:3], 4, find_one_by_one(x[:3], x, 4))


def edit_rows(value: float):
  def edit(path: pathlib.Path) -> None:
    rows = np.load(path, mmap_mode='r+')
    rows[7] *= value
    rows.flush()

  return edit


def edit_bytes(old: bytes, new: bytes):
  def edit(path: pathlib.Path) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))

  return edit


def edit_index(path: pathlib.Path) -> None:
  path = path.with_name('index.json')
  fields = json.loads(path.read_text())
  fields['shards'][1]['largest_norm'] = 0.5
  path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
  ('name', 'edit', 'fault'),
  [
    ('embeddings-00001.npy', edit_rows(np.inf), 'row 8: .* is not finite'),
    ('embeddings-00001.npy', edit_rows(9), 'row 8: .* not have the length 1'),
    ('embeddings-00001.npy', edit_rows(1 + 1e-6), 'its SHA-256 is not'),
    (
      'embeddings-00001.npy',
      lambda path: np.save(path, np.load(path)[:-1]),
      r'found float32 \[9, 24\], expected float32 \[10, 24\]',
    ),
    (
      'embeddings-00001.npy',
      lambda path: path.write_bytes(path.read_bytes()[:-1]),
      'cannot be read',
    ),
    (
      'embeddings-00001.npy',
      edit_index,
      'an embedding has the length 1, more than largest_norm=0.5',
    ),
    ('embeddings-00001.npy', pathlib.Path.unlink, 'cannot be read'),
    ('documents-00001.jsonl', pathlib.Path.unlink, 'cannot be read'),
    ('offsets-00001.npy', pathlib.Path.unlink, 'cannot be read'),
    ('documents-00001.jsonl', edit_bytes(b'"d24"', b'"d2"4'), ':5: not JSON'),
    (
      'documents-00001.jsonl',
      edit_bytes(b'"d24"', b'"d44"'),
      ':5: its end or its id is not that of row 5 of .*offsets-00001.npy',
    ),
    ('documents-00001.jsonl', edit_bytes(b'der 24', b'der 25'), 'its SHA-256'),
    (
      'documents-00001.jsonl',
      lambda path: path.write_bytes(
        b''.join(path.read_bytes().splitlines(True)[:-1])
      ),
      'found 9 lines, expected 10',
    ),
  ],
)
def test_check_finds_and_names_what_was_changed(
  tmp_path, rng, name, edit, fault
):
  index = make_index(tmp_path, draw(rng, 30), (20, 10))
  index.check()
  edit(tmp_path / name)
  with pytest.raises(UserError, match=f'^{tmp_path / name}:? ?{fault}'):
    Index.open(tmp_path).check()


def test_an_index_is_not_made_over_another_nor_opened_where_none_is(tmp_path):
  Index.create(tmp_path, 3, 'bfloat16', {'model': 'ü'}, unit_norm=False)
  index = Index.open(tmp_path)
  assert (len(index), index.dimension, index.dtype) == (0, 3, 'bfloat16')
  assert index.metadata == {'model': 'ü'} and not index.unit_norm
  index.check()
  with pytest.raises(UserError, match='an index already'):
    Index.create(tmp_path, 3)
  with pytest.raises(UserError, match="dtype='int8', expected one of"):
    Index.create(tmp_path / 'new', 3, 'int8')
  with pytest.raises(UserError, match='dimension=0'):
    Index.create(tmp_path / 'new', 0)
  with pytest.raises(UserError, match='no index'):
    Index.open(tmp_path / 'new')
  path = tmp_path / 'index.json'
  fields = json.loads(path.read_text())
  path.write_text(json.dumps({**fields, 'version': 7}))
  with pytest.raises(UserError, match='found version 7, expected 1'):
    Index.open(tmp_path)
  path.write_text('[]')
  with pytest.raises(UserError, match='index.json is not a JSON object'):
    Index.open(tmp_path)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('dtype', 'save'),
    ('dtype', 'float8'),
    ('dimension', 10**30),
    ('shards/0/rows', 10**30),
    ('shards/0/rows', 0),
    ('shards/0/largest_norm', math.nan),
    ('shards/0/sha256/..', 'x'),
  ],
)
def test_a_value_that_cannot_be_is_named(tmp_path, rng, key, value):
  make_index(tmp_path, draw(rng, 30), (20, 10))
  path = tmp_path / 'index.json'
  fields = json.loads(path.read_text())
  *groups, name = key.split('/')
  inner = fields
  for group in groups:
    inner = inner[int(group) if group.isdecimal() else group]
  inner[name] = value
  path.write_text(json.dumps(fields))
  with pytest.raises(UserError, match=f'^{path}.*: '):
    Index.open(tmp_path)


def test_every_damage_of_index_json_is_named(tmp_path, rng):
  make_index(tmp_path, draw(rng, 30), (20, 10))
  check_every_damage_is_named(
    tmp_path / 'index.json',
    lambda: Index.open(tmp_path),
    unread=['documents', 'metadata/.*'],
  )
