"""Tests of how a corpus becomes an index, and of what stops it."""

import gzip
import hashlib
import json
import pathlib

import numpy as np
import pytest
import zstandard

from grit_jax.data.records import RecordError
from grit_jax.data.sources import FileSource
from grit_jax.errors import UserError
from grit_jax.inference.corpus import (
  CorpusWriter,
  parse_document,
  writing_index,
)
from grit_jax.inference.index import Index

DIMENSION = 6
SETTINGS = {'model': '/a', 'model_sha256': '12', 'instruction': 'ü'}


def embed(documents: list[dict]) -> np.ndarray:
  """Draws the embedding of a text, by its hash."""
  rows = []
  for document in documents:
    content = (document.get('title', '') + document['text']).encode()
    seed = list(hashlib.sha256(content).digest())
    x = np.random.default_rng(seed).standard_normal(DIMENSION)
    rows.append(x / np.linalg.norm(x))
  return np.array(rows, np.float32)


class Killed(BaseException):
  pass


def embed_until(shard: int):
  calls = 0

  def embed_or_stop(documents: list[dict]) -> np.ndarray:
    nonlocal calls
    if calls == shard:
      raise Killed
    calls += 1
    return embed(documents)

  return embed_or_stop


def write_corpus(path: pathlib.Path, count: int = 23) -> pathlib.Path:
  path.write_text(
    ''.join(
      json.dumps({'_id': f'd{i}', 'title': 't' * (i % 3), 'text': f'text {i}'})
      + '\n'
      for i in range(count)
    )
  )
  return path


def open_writer(
  path: pathlib.Path,
  folder: pathlib.Path,
  settings: dict = SETTINGS,
  dtype: str = 'bfloat16',
  shard_documents: int = 5,
) -> CorpusWriter:
  return CorpusWriter(
    FileSource(path), folder, settings, dtype, shard_documents
  )


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  # Its lock says when it was held.
  return {
    path.name: path.read_bytes()
    for path in folder.iterdir()
    if not path.name.endswith('.lock')
  }


@pytest.mark.parametrize(
  ('line', 'document'),
  [
    ('"a text"', {'id': '6', 'text': 'a text'}),
    ('{"text": "a"}', {'id': '6', 'text': 'a'}),
    ('{"text": "", "title": null, "id": null}', {'id': '6', 'text': ''}),
    ('{"text": "a", "title": " "}', {'id': '6', 'text': 'a'}),
    (
      '{"_id": "x", "title": "T", "text": "a", "metadata": {"url": "u"}}',
      {'id': 'x', 'text': 'a', 'title': 'T'},
    ),
    ('{"id": 17, "text": "a"}', {'id': '17', 'text': 'a'}),
  ],
)
def test_documents_of_the_usual_corpora_are_read(line, document):
  assert parse_document(line.encode(), 'c.jsonl:7', 6) == document


@pytest.mark.parametrize(
  ('line', 'fault'),
  [
    ('{"text": "a"', 'not valid JSON'),
    ('', 'the line is empty'),
    ('["a"]', 'the line: found a list of 1, expected an object or a string'),
    ('{"title": "a"}', '"text" is missing'),
    ('{"text": ["a"]}', 'text: found a list of 1, expected a string'),
    ('{"text": "a", "title": 3}', 'title: found the number 3, expected a str'),
    ('{"text": "\\ud800"}', 'text: found half a surrogate pair'),
    ('{"text": "a\\u0000"}', 'text: found a null character at 1'),
    ('{"text": "a", "id": true}', 'id: found a boolean, expected a string or'),
    ('{"text": "a", "_id": ""}', '_id: found an empty string'),
    ('{"text": "a", "_id": 1, "id": 1}', 'found both "id" and "_id"'),
    ('{"text": "a", "_id": "d2"}', "the id 'd2' is also that of .*jsonl:3"),
  ],
)
def test_a_wrong_line_is_named_before_anything_is_embedded(
  tmp_path, line, fault
):
  path = write_corpus(tmp_path / 'c.jsonl')
  with path.open('a') as file:
    file.write(f'{line}\n"one more"\n')
  with pytest.raises(RecordError, match=f'^{path}:24: {fault}'):
    open_writer(path, tmp_path / 'index')


def test_an_empty_corpus_is_refused(tmp_path):
  path = write_corpus(tmp_path / 'c.jsonl', 0)
  with pytest.raises(RecordError, match='there are no documents in it'):
    open_writer(path, tmp_path / 'index')


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_a_corpus_becomes_an_index_in_its_order(tmp_path, suffix):
  path = write_corpus(tmp_path / 'c.jsonl')
  compress = {'.gz': gzip.compress, '.zst': zstandard.compress}
  if suffix:
    packed = path.with_name(f'c.jsonl{suffix}')
    packed.write_bytes(compress[suffix](path.read_bytes()))
    path = packed
  open_writer(path, tmp_path / 'index', dtype='float32').write(embed)
  index = Index.open(tmp_path / 'index')
  index.check()
  documents = index.documents(range(23))
  assert [d['id'] for d in documents] == [f'd{i}' for i in range(23)]
  assert [d['text'] for d in documents] == [f'text {i}' for i in range(23)]
  assert [d.get('title', '') for d in documents] == [
    't' * (i % 3) for i in range(23)
  ]
  np.testing.assert_array_equal(index.embeddings(range(23)), embed(documents))
  assert len(list((tmp_path / 'index').glob('*.jsonl'))) == 5
  assert index.metadata['documents'] == 23
  assert SETTINGS.items() <= index.metadata.items()


@pytest.mark.parametrize('shard', range(5))
def test_a_killed_run_goes_on_and_writes_the_same_bytes(tmp_path, shard):
  path = write_corpus(tmp_path / 'c.jsonl')
  open_writer(path, tmp_path / 'whole').write(embed)
  folder = tmp_path / 'index'
  with pytest.raises(Killed):
    open_writer(path, folder).write(embed_until(shard))
  writer = open_writer(path, folder)
  assert (writer.done, writer.total) == (5 * shard, 23)
  embedded = []
  writer.write(lambda documents: embedded.extend(documents) or embed(documents))
  assert [d['id'] for d in embedded] == [f'd{i}' for i in range(5 * shard, 23)]
  assert files_of(folder) == files_of(tmp_path / 'whole')
  assert open_writer(path, folder).done == 23


def change_last(path: pathlib.Path) -> None:
  path.write_text(path.read_text().replace('text 22', 'text 23'))


@pytest.mark.parametrize(
  ('changed', 'fault'),
  [
    ({'settings': {**SETTINGS, 'instruction': ''}}, "instruction='ü', not ''"),
    (
      {'settings': {**SETTINGS, 'model': '/b', 'model_sha256': '13'}},
      r'another content of model \(/a\) than /b has now',
    ),
    ({'dtype': 'float32'}, "dtype='bfloat16', not 'float32'"),
    ({'shard_documents': 6}, 'shard_documents=5, not 6'),
    ({}, r'another content of input \(.*c.jsonl\) than .*c.jsonl has now'),
  ],
)
def test_another_run_does_not_go_on_in_a_folder(tmp_path, changed, fault):
  path, folder = write_corpus(tmp_path / 'c.jsonl'), tmp_path / 'index'
  with pytest.raises(Killed):
    open_writer(path, folder).write(embed_until(2))
  before = files_of(folder)
  if not changed:
    change_last(path)
  with pytest.raises(UserError, match=f'^{folder}: was begun with {fault}'):
    open_writer(path, folder, **changed)
  assert files_of(folder) == before


def test_what_was_moved_is_the_same(tmp_path):
  path, folder = write_corpus(tmp_path / 'c.jsonl'), tmp_path / 'index'
  with pytest.raises(Killed):
    open_writer(path, folder).write(embed_until(2))
  moved = path.rename(tmp_path / 'moved.jsonl')
  writer = open_writer(moved, folder, {**SETTINGS, 'model': '/b'})
  writer.write(embed)
  assert len(Index.open(folder)) == 23


def test_an_index_extended_before_it_was_whole_is_refused(tmp_path):
  path, folder = write_corpus(tmp_path / 'c.jsonl'), tmp_path / 'index'
  with pytest.raises(Killed):
    open_writer(path, folder).write(embed_until(2))
  other = [{'id': 'x', 'text': 'of another'}]
  Index.open(folder).extend(embed(other), other)
  with pytest.raises(UserError, match="document 10 is 'x', not that of"):
    open_writer(path, folder)


def test_an_index_is_not_written_over_a_file(tmp_path):
  path = write_corpus(tmp_path / 'c.jsonl')
  for folder in path, 'gs://bucket/index':
    with pytest.raises(UserError, match=f'^{folder}: not a folder of a'):
      with writing_index(folder):
        raise AssertionError


def test_a_text_that_is_blank_is_counted(tmp_path, caplog):
  path = tmp_path / 'c.jsonl'
  path.write_text('" "\n{"text": "", "title": "T"}\n"a"\n')
  with caplog.at_level('INFO'):
    open_writer(path, tmp_path / 'index')
  assert '3 documents, 1 of them without any text' in caplog.text
