"""Tests of where records come from."""

import concurrent.futures
import gzip
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from grit_jax.data import records, sources
from grit_jax.data.records import RecordError, Text
from grit_jax.data.sources import HELD_OUT, TRAIN, FileSource, TfdsSource
from grit_jax.errors import UserError


def write_lines(path: pathlib.Path, texts: list[str]) -> pathlib.Path:
  lines = [json.dumps({'text': text}) + '\n' for text in texts]
  path.write_text(''.join(lines))
  return path


def read_numbers(
  source: sources.Source, split: str, fraction: float
) -> list[int]:
  return [line.number for line in source.read(fraction) if line.split == split]


class TinyRecords(tfds.core.GeneratorBasedBuilder):
  """Three records for training, one for test; a data set with two configs."""

  VERSION = tfds.core.Version('1.2.0')
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name='chat'),
    tfds.core.BuilderConfig(name='prose'),
  ]
  FIELD = 'json'

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({self.FIELD: tfds.features.Text()})
    return tfds.core.DatasetInfo(
      builder=self, features=features, disable_shuffling=True
    )

  def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
    del dl_manager
    return {
      'train': self._generate_examples(0, 3),
      'test': self._generate_examples(3, 4),
    }

  def _generate_examples(
    self, start: int, stop: int
  ) -> Iterator[tuple[int, dict[str, str]]]:
    for i in range(start, stop):
      yield i, {self.FIELD: json.dumps({'text': f'{i}'})}


class OtherField(TinyRecords):
  """A data set without the field."""

  BUILDER_CONFIGS = []
  FIELD = 'sentence'


class RecordFields(tfds.core.GeneratorBasedBuilder):
  """A data set whose features are the fields of a record."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    features = {
      'id': np.int64,
      'query': tfds.features.Sequence(text, length=2),
      'pos': tfds.features.Tensor(shape=(None, 2), dtype=np.str_),
      'neg': tfds.features.Sequence(text),
      'origin': text,
    }
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
    del dl_manager
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, object]]]:
    for i in range(3):
      yield (
        i,
        {
          'id': i,
          'query': ['find é', 'the 🙂'],
          'pos': [['', 'p'], ['', 'r']],
          'neg': ['n'] * i,
          'origin': 'o',
        },
      )


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path):
  for name in 'b.jsonl', 'a.jsonl', 'c.txt':
    write_lines(tmp_path / name, ['t'])
  (tmp_path / 'd.jsonl.gz').write_bytes(gzip.compress(b'{"text": "t"}'))
  (tmp_path / 'e.jsonl.zst').write_bytes(zstandard.compress(b'{"text": "t"}'))
  found = sources.sources(str(tmp_path))
  assert [source.name for source in found] == ['a', 'b', 'd', 'e']


def test_entries_may_be_files_and_folders(tmp_path):
  folder = tmp_path / 'more'
  folder.mkdir()
  write_lines(folder / 'b.jsonl', ['t'])
  file = write_lines(tmp_path / 'a.jsonl', ['t'])
  found = sources.sources(f'{folder}, {file}')
  assert [source.name for source in found] == ['b', 'a']


def test_a_compressed_file_reads_like_a_plain_one(tmp_path):
  plain = FileSource(write_lines(tmp_path / 'a.jsonl', ['x', 'y', 'é']))
  path = tmp_path / 'b.jsonl.gz'
  path.write_bytes(gzip.compress((tmp_path / 'a.jsonl').read_bytes()))
  # The position, which is one in the file, alone differs.
  assert [line[:3] for line in FileSource(path).read(0.5)] == [
    line[:3] for line in plain.read(0.5)
  ]


def test_the_first_record_tells_the_kind(tmp_path):
  source = FileSource(write_lines(tmp_path / 'a.jsonl', ['t']))
  assert source.kind == records.GENERATIVE


def test_the_kind_is_that_of_the_first_record_that_can_be_read(tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', ['', '', 't'])
  assert FileSource(path).kind == records.GENERATIVE
  path = write_lines(tmp_path / 'b.jsonl', ['', ''])
  with pytest.raises(RecordError, match='b.jsonl:1: text: found an empty'):
    _ = FileSource(path).kind


def test_splits_part_the_lines_and_keep_their_numbers(tmp_path):
  texts = [f'text {i}' for i in range(2000)]
  source = FileSource(write_lines(tmp_path / 'a.jsonl', texts))
  train = read_numbers(source, TRAIN, 0.1)
  held_out = read_numbers(source, HELD_OUT, 0.1)
  assert sorted(train + held_out) == list(range(1, 2001))
  assert train == sorted(train)
  # 200 expected; seven standard deviations of a fair draw are 94.
  assert 106 < len(held_out) < 294
  assert read_numbers(source, HELD_OUT, 0.0) == []
  line = list(source.read(0.1))[3]
  assert json.loads(line.json) == {'text': f'text {line.number - 1}'}
  assert source.where(HELD_OUT, 4) == f'{tmp_path}/a.jsonl:4'


def test_positions_reach_the_size(tmp_path):
  source = FileSource(write_lines(tmp_path / 'a.jsonl', ['x', 'yy']))
  positions = [line.position for line in source.read(0.0)]
  assert positions == [14, 29] and source.size == 29


def test_a_line_stays_in_its_split_when_others_come_and_go(tmp_path):
  texts = [f'text {i}' for i in range(100)]
  held_out = []
  for name, part in ('a', texts), ('b', texts[50:] + ['new'] + texts[:50]):
    source = FileSource(write_lines(tmp_path / f'{name}.jsonl', part))
    read = source.read(0.3)
    lines = {line.json for line in read if line.split == HELD_OUT}
    held_out.append(lines - {b'{"text": "new"}'})
  assert held_out[0] == held_out[1]


def test_line_ends_do_not_matter_to_the_split(tmp_path):
  unix = FileSource(write_lines(tmp_path / 'a.jsonl', list('abcdefgh')))
  path = tmp_path / 'b.jsonl'
  path.write_bytes(
    (tmp_path / 'a.jsonl').read_bytes().replace(b'\n', b'\r\n').rstrip()
  )
  assert [line[:3] for line in FileSource(path).read(0.5)] == [
    line[:3] for line in unix.read(0.5)
  ]


def test_a_file_that_changes_has_another_state(tmp_path):
  source = FileSource(write_lines(tmp_path / 'a.jsonl', ['x']))
  before = source.state()
  assert before == source.state()
  os.utime(tmp_path / 'a.jsonl', (1, 1))
  assert before != source.state()


def test_fingerprints_tell_contents_apart(tmp_path):
  a, b, c = (
    FileSource(write_lines(tmp_path / f'{name}.jsonl', [text])).fingerprint()
    for name, text in (('a', 'x'), ('b', 'x'), ('c', 'y'))
  )
  assert a == b != c


def test_one_name_twice_is_refused(tmp_path):
  (tmp_path / 'more').mkdir()
  a = write_lines(tmp_path / 'a.jsonl', ['t'])
  b = write_lines(tmp_path / 'more' / 'a.jsonl', ['t'])
  with pytest.raises(RecordError, match=f"{b}: its name 'a' .* {a}"):
    sources.sources(f'{a},{b}')


def test_a_missing_path_is_named():
  with pytest.raises(FileNotFoundError, match='no/such.jsonl: there is no'):
    sources.sources('no/such.jsonl')


def test_an_empty_file_is_named(tmp_path):
  write_lines(tmp_path / 'a.jsonl', ['t'])
  write_lines(tmp_path / 'b.jsonl', [])
  with pytest.raises(RecordError, match=r'b\.jsonl: there are no records'):
    sources.sources(str(tmp_path))


def test_a_malformed_first_line_is_named(tmp_path):
  (tmp_path / 'a.jsonl').write_text('oops\n')
  with pytest.raises(RecordError, match=r'a\.jsonl:1: not valid JSON'):
    sources.sources(str(tmp_path))


def test_a_folder_without_files_is_named(tmp_path):
  with pytest.raises(RecordError, match=f'{tmp_path}: there is no file .js'):
    sources.sources(str(tmp_path))


def test_another_file_type_is_refused(tmp_path):
  path = tmp_path / 'a.parquet'
  path.write_text('')
  with pytest.raises(RecordError, match='expected a file .jsonl, .jsonl.gz or'):
    sources.sources(str(path))


@pytest.mark.parametrize('paths', ['', ' ', ',a.jsonl'])
def test_an_empty_entry_is_refused(paths: str):
  with pytest.raises(RecordError, match='found an empty entry'):
    sources.sources(paths)


def test_a_tfds_data_set_gives_its_splits_in_order(tmp_path):
  (source,) = sources.sources('tfds:tiny_records/chat', tmp_path)
  assert (source.name, source.kind) == ('tiny_records_chat', 'generative')
  read = [(*line[:2], json.loads(line.json)) for line in source.read(0.9)]
  assert read == [
    *((TRAIN, i, {'text': f'{i}'}) for i in range(3)),
    (HELD_OUT, 0, {'text': '3'}),
  ]
  assert source.where(HELD_OUT, 0) == 'tfds:tiny_records/chat:test[0]'
  assert 'tiny_records/chat/1.2.0' in source.fingerprint()


def test_a_tfds_data_set_without_a_config_gives_all_of_them(tmp_path):
  found = sources.sources('tfds:tiny_records', tmp_path)
  assert [source.name for source in found] == [
    'tiny_records_chat',
    'tiny_records_prose',
  ]


def test_a_tfds_data_set_without_the_field_is_refused(tmp_path):
  with pytest.raises(RecordError, match='sentence.* expected .*json'):
    sources.sources('tfds:other_field', tmp_path)


def test_features_of_a_tfds_data_set_may_be_the_fields(tmp_path):
  (source,) = sources.sources('tfds:record_fields', tmp_path)
  assert source.kind == records.EMBEDDING
  read = [records.parse(line.json, '') for line in source.read(0.0)]
  assert read == [
    records.EmbeddingRecord(
      query=Text('find é', 'the 🙂'),
      positives=(Text('', 'p'), Text('', 'r')),
      negatives=(Text(None, 'n'),) * i,
      id=f'{i}',
    )
    for i in range(3)
  ]


def test_a_tfds_data_set_is_built_once_for_all_who_want_it(
  tmp_path, monkeypatch
):
  built, together = [], threading.Barrier(4)
  prepare = TinyRecords.download_and_prepare

  def count(self, **arguments):
    exists = pathlib.Path(self.data_dir).exists()
    time.sleep(0.2)  # for the others to look, if nothing holds them
    prepare(self, **arguments)
    built.append(not exists)

  monkeypatch.setattr(TinyRecords, 'download_and_prepare', count)

  def open_one(_: int) -> int:
    source = TfdsSource('tiny_records/chat', tmp_path)
    together.wait()
    # Python 3.11 lets one thread at a time into a cached property.
    builder = TfdsSource._builder.func(source)
    return len(builder.as_data_source('train'))

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    first, *others = pool.map(open_one, range(4))
  assert first and others == [first] * 3
  assert sorted(built) == [False, False, False, True]


def test_an_unknown_tfds_data_set_is_named(tmp_path):
  with pytest.raises(RecordError, match='tfds:unheard_of: TFDS knows no'):
    sources.sources('tfds:unheard_of', tmp_path)


def test_a_built_tfds_data_set_is_read_without_its_code(tmp_path):
  sources.sources('tfds:tiny_records/prose', tmp_path)
  (tmp_path / 'tiny_records').rename(tmp_path / 'renamed')
  for path in (tmp_path / 'renamed').rglob('*'):
    if path.name == 'dataset_info.json':
      path.write_text(path.read_text().replace('tiny_records', 'renamed'))
    elif 'tiny_records' in path.name:
      path.rename(path.with_name(path.name.replace('tiny_records', 'renamed')))
  source = TfdsSource('renamed/prose', tmp_path)
  assert read_numbers(source, TRAIN, 0.0) == [0, 1, 2]


def test_the_standard_library_is_known_by_name(tmp_path):
  # Its own tests build it; here only that naming it is enough.
  found = sources._find_tfds('standard_library', tmp_path)
  assert [source.name for source in found] == [
    'standard_library_embedding',
    'standard_library_generative',
  ]


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_place_of_a_file_is_named(tmp_path, make):
  """Opening a pipe waits for ever."""
  path = tmp_path / 'data' / 'x.jsonl'
  path.parent.mkdir()
  make(path)
  with pytest.raises(UserError, match='x.jsonl: a .*, expected a regular file'):
    sources.sources(str(tmp_path / 'data'))
  with pytest.raises(UserError, match='x.jsonl: a .*, expected a regular file'):
    FileSource(path).fingerprint()


def test_a_tfds_folder_that_names_code_is_refused(tmp_path):
  sources.sources('tfds:tiny_records', tmp_path)
  for path in tmp_path.glob('**/features.json'):
    content = path.read_text()
    own = '"tensorflow_datasets.core.features.text_feature.Text"'
    assert own in content
    path.write_text(content.replace(own, '"this.Text"'))
  # One that no code registers, as somebody could hand it on.
  (tmp_path / 'tiny_records').rename(tmp_path / 'handed_on')
  with pytest.raises(UserError, match=r"features.json names the class 'this\."):
    sources.sources('tfds:handed_on/chat', tmp_path)
  assert 'this' not in sys.modules


@pytest.mark.parametrize('name', ['', '../x', 'a/b/c', 'a:b'])
def test_a_name_that_tfds_cannot_have_is_refused(tmp_path, name):
  with pytest.raises(RecordError, match='expected tfds:NAME'):
    sources.sources(f'tfds:{name}', tmp_path)


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path):
  (tmp_path / os.fsdecode(b'caf\xe9.jsonl')).write_text(
    '{"text": ["a", "b"]}\n'
  )
  with pytest.raises(
    UserError, match=r'caf\\udce9.jsonl.: the name is not UTF'
  ):
    sources.sources(str(tmp_path))
