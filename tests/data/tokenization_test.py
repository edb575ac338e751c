"""Tests of what preparing does with faulty data, kills and many processes."""

import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from json_damage import check_every_damage_is_named

from grit_jax.data import (
  dataset,
  merging,
  parts,
  records,
  tokenization,
  workers,
)
from grit_jax.data.dataset import EmptySplitError
from grit_jax.data.examples import NO_ANSWER
from grit_jax.data.parts import IDS
from grit_jax.data.records import RecordError
from grit_jax.data.sources import HELD_OUT, TRAIN, FileSource
from grit_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer

LIMITS = dict(
  max_query_tokens=24,
  max_passage_tokens=32,
  max_generative_tokens=64,
  min_negatives=1,
  held_out_fraction=0.1,
)
SETTINGS = dict(LIMITS, on_error='stop', max_skipped_fraction=0.01)
ROOT = pathlib.Path(__file__).parents[2]


def make_records(count: int) -> list[dict]:
  return [
    {
      'id': f'record {i}',
      'query': ['Find', f'query {i}'],
      'pos': [['', f'positive {i} ' + 'long ' * (i % 9)]],
      'neg': [f'negative {i} {j}' for j in range(1 + i % 2)],
    }
    for i in range(count)
  ]


def write_lines(path: pathlib.Path, lines: list[dict | str]) -> FileSource:
  texts = [
    line if isinstance(line, str) else json.dumps(line) for line in lines
  ]
  path.write_text(''.join(text + '\n' for text in texts))
  return FileSource(path)


def read_files(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file() and not path.name.endswith('.lock')
  }


def list_whole(directory: pathlib.Path) -> list[str]:
  return sorted(path.parent.name for path in directory.glob('*/dataset.json'))


@pytest.fixture
def prepare(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> Callable:
  """`dataset.prepare` in a folder of its own, limits as in LIMITS."""

  def run(source, split=TRAIN, directory=tmp_path / 'prepared', **changes):
    return dataset.prepare(
      source, split, tokenizer, directory, **(LIMITS | changes)
    )

  return run


@pytest.fixture
def tokenize(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> Callable:
  """`tokenization.tokenize` in a folder, settings as in SETTINGS."""

  def run(found, directory, workers=1, **changes):
    return tokenization.tokenize(
      found,
      tokenizer,
      tmp_path / directory,
      parts.Settings(**(SETTINGS | changes)),
      workers,
    )

  return run


@pytest.fixture
def count_encoded(monkeypatch) -> list[int]:
  """Collects the sizes of the batches that are tokenized."""
  sizes: list[int] = []
  encode_batch = SentencePieceTokenizer.encode_batch

  def count(self, texts, num_threads=-1):
    sizes.append(len(texts))
    return encode_batch(self, texts, num_threads)

  monkeypatch.setattr(SentencePieceTokenizer, 'encode_batch', count)
  return sizes


BAD = {
  'broken JSON': ('{"query": ', records.NOT_JSON, 'not valid JSON: '),
  'not UTF-8': (
    '{"text": "\udcff"}',
    records.NOT_UTF8,
    'not UTF-8: invalid start byte',
  ),
  'a wrong type deep inside': (
    {'query': 'q', 'pos': ['p'], 'neg': ['n', ['i', {'a': 1}]]},
    records.WRONG_FIELDS,
    'neg[1][1]: found an object, expected a string',
  ),
  'an empty text': (
    {'query': ['i', ' '], 'pos': ['p'], 'neg': ['n']},
    records.EMPTY_TEXT,
    'query[1]: found only blanks',
  ),
  'no negatives': (
    {'query': 'q', 'pos': ['p'], 'neg': []},
    records.TOO_FEW_NEGATIVES,
    'neg: found 0 negatives, expected 1 or more',
  ),
  'null bytes': (
    {'query': 'q', 'pos': ['p\0'], 'neg': ['n']},
    records.NULL_CHARACTER,
    'pos[0]: found a null character at 1',
  ),
  'half a surrogate pair': (
    {'query': 'q\ud800', 'pos': ['p'], 'neg': ['n']},
    records.SURROGATE,
    'query: found half a surrogate pair',
  ),
  'an instruction without room': (
    {'query': ['x ' * 99, 't'], 'pos': ['p'], 'neg': ['n']},
    records.NO_ROOM,
    'query: the instruction takes ',
  ),
  'another kind': (
    {'text': ['user', 'assistant']},
    records.ANOTHER_KIND,
    'found a record of the generative kind',
  ),
  'an id of another type': (
    {'id': ['a'], 'query': 'q', 'pos': ['p'], 'neg': ['n']},
    records.WRONG_FIELDS,
    'id: found a list of 1, expected a string or a number',
  ),
  'an id twice': (
    {'id': 'record 3', 'query': 'q', 'pos': ['p'], 'neg': ['n']},
    records.DUPLICATE_ID,
    'its id is also that of {path}:4',
  ),
}


def write_bad(tmp_path: pathlib.Path, name: str) -> FileSource:
  bad, _, _ = BAD[name]
  lines = make_records(200)
  lines.insert(100, bad)
  path = tmp_path / 'a.jsonl'
  texts = [
    line if isinstance(line, str) else json.dumps(line) for line in lines
  ]
  path.write_text('\n'.join(texts) + '\n', errors='surrogateescape')
  return FileSource(path)


@pytest.mark.parametrize('name', BAD)
def test_a_faulty_record_stops_with_its_file_and_line(prepare, tmp_path, name):
  source = write_bad(tmp_path, name)
  with pytest.raises(RecordError) as error:
    prepare(source)
  path = tmp_path / 'a.jsonl'
  message = BAD[name][2].format(path=path)
  assert str(error.value).startswith(f'{path}:101: {message}')
  assert list_whole(tmp_path / 'prepared') == []


@pytest.mark.parametrize('name', BAD)
def test_a_faulty_record_is_skipped_and_counted(prepare, tmp_path, name):
  source = write_bad(tmp_path, name)
  found = [
    prepare(source, split, on_error='skip') for split in (TRAIN, HELD_OUT)
  ]
  numbers = sorted(sum((data.record_ids.tolist() for data in found), []))
  assert numbers == [i for i in range(1, 202) if i != 101]
  _, reason, message = BAD[name]
  path = tmp_path / 'a.jsonl'
  (report,) = [data.report for data in found if data.report.skipped]
  assert report.skipped == {reason: 1}
  (fault,) = report.faults[reason]
  assert fault.startswith(f'{path}:101: {message.format(path=path)}')


def test_more_faults_than_allowed_stop_and_are_told_by_reason(
  prepare, tmp_path, count_encoded
):
  lines = [*make_records(97), 'oops', 'oops', {'text': 't'}]
  source = write_lines(tmp_path / 'a.jsonl', lines)
  with pytest.raises(RecordError) as error:
    prepare(source, on_error='skip', max_skipped_fraction=0.029)
  message = str(error.value)
  assert message.startswith(f'{source}: 3 of 100 records were skipped (')
  assert '2 not valid JSON' in message and '1 another kind' in message
  assert 'max_skipped_fraction=0.029' in message
  assert f'{source}:98: not valid JSON' in message
  assert list_whole(tmp_path / 'prepared') == []
  # What is whole is kept.
  encoded = len(count_encoded)
  data = prepare(source, on_error='skip', max_skipped_fraction=0.03)
  assert len(count_encoded) == encoded
  assert sum(data.report.skipped.values()) > 0
  with pytest.raises(RecordError, match='3 of 100 records were skipped'):
    prepare(source, on_error='skip', max_skipped_fraction=0.029)


def test_what_was_skipped_stops_where_nothing_may_be(
  prepare, tmp_path, count_encoded
):
  source = write_bad(tmp_path, 'broken JSON')
  prepare(source, on_error='skip')
  with pytest.raises(RecordError, match='a.jsonl:101: not valid JSON'):
    prepare(source, on_error='stop')
  assert len(list_whole(tmp_path / 'prepared')) == 1


def test_without_faults_on_error_does_not_matter(
  prepare, tmp_path, count_encoded
):
  source = write_lines(tmp_path / 'a.jsonl', make_records(50))
  prepare(source, on_error='skip')
  encoded = len(count_encoded)
  prepare(source, on_error='stop')
  prepare(source, on_error='skip', min_negatives=0)
  assert len(count_encoded) == encoded
  assert len(list_whole(tmp_path / 'prepared')) == 1


def test_more_negatives_than_a_data_set_has_skip_other_records(
  prepare, tmp_path
):
  lines = make_records(50)
  lines[9]['neg'] = ['n'] * 3
  source = write_lines(tmp_path / 'a.jsonl', lines)
  options = dict(
    on_error='skip', max_skipped_fraction=1.0, held_out_fraction=0.0
  )
  assert len(prepare(source, **options)) == 50
  fewer = prepare(source, **options, min_negatives=2)
  assert fewer.record_ids.tolist() == list(range(2, 51, 2))
  assert fewer.report.skipped == {records.TOO_FEW_NEGATIVES: 25}
  fewest = prepare(source, **options, min_negatives=3)
  assert fewest.record_ids.tolist() == [10]
  assert len(prepare(source, **options, min_negatives=1)) == 50


def test_the_first_faults_alone_are_told(prepare, tmp_path):
  lines = make_records(20)
  for i in range(5, 15):
    lines[i] = 'oops'
  report = prepare(
    write_lines(tmp_path / 'a.jsonl', lines),
    on_error='skip',
    max_skipped_fraction=0.5,
    held_out_fraction=0.0,
  ).report
  assert report.skipped == {records.NOT_JSON: 10}
  told = report.faults[records.NOT_JSON]
  assert [fault.split(': ')[0][-2:] for fault in told] == [':6', ':7', ':8']


def test_a_data_set_without_a_usable_record_is_refused(prepare, tmp_path):
  lines = [{'text': ['much too long ' * 50, 'answer']}] * 30
  source = write_lines(tmp_path / 'a.jsonl', lines)
  for on_error in 'stop', 'skip':
    with pytest.raises(EmptySplitError, match=f"dropped: .*'{NO_ANSWER}': 30"):
      prepare(source, on_error=on_error, held_out_fraction=0.0)
  source = write_lines(tmp_path / 'b.jsonl', [{'text': 't'}, 'oops', 'oops'])
  with pytest.raises(RecordError, match='2 of 3 records were skipped'):
    prepare(source, on_error='skip')


def test_a_text_of_ten_megabytes_is_cut_and_counted(
  prepare, tmp_path, tokenizer
):
  # Every line of it is the same tokens.
  few, more = (len(tokenizer.encode('word\n' * n)) for n in (5, 6))
  lines = 2_000_000
  tokens = few + (lines - 5) * (more - few)
  source = write_lines(tmp_path / 'a.jsonl', [{'text': 'word\n' * lines}])
  started = time.process_time()
  data = prepare(source, held_out_fraction=0.0)
  # 10 s of the slowest core; quadratic time would take hours.
  assert time.process_time() - started < 100
  report = data.report
  assert (report.tokens, report.cut_texts) == (64, 1)
  assert report.cut_tokens == tokens - 64


@pytest.mark.parametrize('on_error', ['stop', 'skip'])
@pytest.mark.parametrize('kind', ['gz', 'zst'])
def test_a_truncated_file_stops(prepare, tmp_path, kind, on_error):
  compress = gzip.compress if kind == 'gz' else zstandard.compress
  lines = [json.dumps(line) for line in make_records(2000)]
  data = compress('\n'.join(lines).encode())
  path = tmp_path / f'a.jsonl.{kind}'
  path.write_bytes(data[:-20])
  with pytest.raises(RecordError, match=f'^{path}: not a whole'):
    prepare(FileSource(path), on_error=on_error)
  assert list_whole(tmp_path / 'prepared') == []


class GrowingSource(FileSource):
  """A file that grows while it is read."""

  def read(self, held_out_fraction):
    for line in super().read(held_out_fraction):
      yield line
      if line.number == 3 and held_out_fraction:
        with open(self._path, 'a') as file:
          file.write('{"text": "one more"}\n')


@pytest.mark.parametrize('on_error', ['stop', 'skip'])
def test_a_file_that_changes_meanwhile_stops(prepare, tmp_path, on_error):
  write_lines(tmp_path / 'a.jsonl', [{'text': 'some text'}] * 9)
  source = GrowingSource(tmp_path / 'a.jsonl')
  with pytest.raises(RecordError, match=f'^{source}: changed while it was'):
    prepare(source, on_error=on_error)
  assert list_whole(tmp_path / 'prepared') == []


def test_a_file_that_changed_is_prepared_anew(
  prepare, tmp_path, count_encoded, caplog
):
  path = tmp_path / 'a.jsonl'
  prepare(write_lines(path, make_records(50)))
  # Long ago, so that size and time are trusted.
  os.utime(path, (1, 1))
  encoded = len(count_encoded)
  prepare(FileSource(path))
  assert len(count_encoded) == encoded
  with caplog.at_level('INFO', logger='absl'):
    data = prepare(write_lines(path, make_records(51)))
  assert data.record_ids.max() == 51
  assert f'{path} has changed' in caplog.text


def test_one_size_and_time_is_not_hashed_again(prepare, tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl'
  write_lines(path, make_records(50))
  os.utime(path, (1, 1))
  prepare(FileSource(path))
  with monkeypatch.context() as context:
    context.setattr(FileSource, 'fingerprint', None)
    prepare(FileSource(path))
  # A file as young as the data set may have changed in the same instant.
  path = write_lines(tmp_path / 'b.jsonl', make_records(50))._path
  prepare(FileSource(path))
  hashed = []
  fingerprint = FileSource.fingerprint
  monkeypatch.setattr(
    FileSource,
    'fingerprint',
    lambda self: hashed.append(1) or fingerprint(self),
  )
  prepare(FileSource(path))
  assert hashed


@pytest.mark.parametrize('at_once', [1, 3, 1000])
def test_ids_are_compared_with_all_earlier_ones(tmp_path, monkeypatch, at_once):
  monkeypatch.setattr(merging, '_IDS_AT_ONCE', at_once)
  rng = random.Random(0)
  folders, expected, seen = [], [], {}
  for part in range(4):
    folder = tmp_path / f'{part}'
    folder.mkdir()
    ids = []
    for number in range(10):
      value = rng.choice([0, 2**64 - 1, *(i << 59 for i in range(32))])
      key = ((TRAIN, HELD_OUT)[number % 2], 10 * part + number)
      if value in seen:
        expected.append((part, key, seen[value]))
      seen.setdefault(value, key)
      ids.append((value, number % 2, key[1]))
    np.save(folder / 'ids.npy', np.array(ids, IDS))
    folders.append(folder)
  assert sorted(merging.find_duplicates(folders)) == sorted(expected)


def test_equal_ids_are_found_in_other_parts_and_splits(
  prepare, tmp_path, monkeypatch
):
  monkeypatch.setattr(parts, 'PART_RECORDS', 20)
  lines = make_records(100)
  for later, first in (30, 5), (55, 5), (99, 98):
    lines[later]['id'] = lines[first]['id']
  source = write_lines(tmp_path / 'a.jsonl', lines)
  with pytest.raises(RecordError, match=':31: its id is also that of .*:6$'):
    prepare(source, held_out_fraction=0.5)
  options = dict(
    held_out_fraction=0.5, on_error='skip', max_skipped_fraction=0.03
  )
  found = [prepare(source, split, **options) for split in (TRAIN, HELD_OUT)]
  numbers = sorted(sum((data.record_ids.tolist() for data in found), []))
  assert numbers == [i for i in range(1, 101) if i not in (31, 56, 100)]
  # As if they had never been there.
  kept = [line for i, line in enumerate(lines) if i not in (30, 55, 99)]
  again = write_lines(tmp_path / 'b.jsonl', kept)
  for data, split in zip(found, (TRAIN, HELD_OUT), strict=True):
    other = prepare(again, split, held_out_fraction=0.5)
    assert data.text_hashes.tolist() == other.text_hashes.tolist()
    assert data.offsets.tolist() == other.offsets.tolist()


def test_records_without_an_id_may_be_equal(prepare, tmp_path):
  source = write_lines(tmp_path / 'a.jsonl', [{'text': 'same'}] * 3)
  assert len(prepare(source, held_out_fraction=0.0)) == 3
  lines = [{'text': 'same', 'id': value} for value in (1, '1', 1.5, None, None)]
  source = write_lines(tmp_path / 'b.jsonl', lines)
  assert len(prepare(source, held_out_fraction=0.0)) == 5


def test_the_number_of_processes_does_not_matter(
  tokenize, tmp_path, monkeypatch
):
  lines = make_records(150)
  lines[77] = 'oops'
  lines[120]['id'] = lines[3]['id']
  found = [
    write_lines(tmp_path / 'a.jsonl', lines),
    write_lines(tmp_path / 'b.jsonl', [{'text': f'{i}'} for i in range(60)]),
  ]
  monkeypatch.setattr(parts, 'PART_RECORDS', 20)
  options = dict(on_error='skip', max_skipped_fraction=0.02)
  tokenize(found, 'here', **options)
  monkeypatch.setattr(workers, 'PART_BYTES', 1)
  tokenize(found, 'pool', workers=2, **options)
  here, pool = read_files(tmp_path / 'here'), read_files(tmp_path / 'pool')
  assert sum('tokens-train' in name for name in here) == 8 + 3
  assert here == pool


def test_a_fault_in_another_process_is_the_first_of_the_file(
  tokenize, tmp_path, monkeypatch
):
  monkeypatch.setattr(parts, 'PART_RECORDS', 20)
  monkeypatch.setattr(workers, 'PART_BYTES', 1)
  lines = make_records(100)
  lines[50] = lines[90] = 'oops'
  source = write_lines(tmp_path / 'a.jsonl', lines)
  with pytest.raises(RecordError, match='a.jsonl:51: not valid JSON'):
    tokenize([source], 'pool', workers=2)


def test_little_data_starts_no_process(tokenize, tmp_path, monkeypatch):
  monkeypatch.setattr(workers, '_write_with_workers', None)
  sources = [
    write_lines(tmp_path / f'{name}.jsonl', make_records(9)) for name in 'abc'
  ]
  assert len(tokenize(sources, 'here', workers=2)) == 3


# Prepares `a.jsonl` in parts of 20 records.
PROGRAM = """
import pathlib, sys
from grit_jax.data import parts, tokenization, tokenizer, workers
from grit_jax.data.sources import FileSource
parts.PART_RECORDS = 20
workers.PART_BYTES = 1
folder = pathlib.Path(sys.argv[1])
tokenization.tokenize(
  [FileSource(folder / "a.jsonl")],
  tokenizer.load_tokenizer(folder / "tokenizer.model"),
  folder / sys.argv[2],
  parts.Settings(**{settings!r}),
  int(sys.argv[3]),
)
"""


@pytest.fixture
def start(tmp_path: pathlib.Path, model_bytes: bytes) -> Callable:
  """Starts a process that prepares 800 records into a folder."""
  (tmp_path / 'tokenizer.model').write_bytes(model_bytes)
  write_lines(tmp_path / 'a.jsonl', make_records(800))
  program = PROGRAM.format(settings=SETTINGS)

  def run(folder: str, workers: int) -> subprocess.Popen:
    return subprocess.Popen(
      [sys.executable, '-c', program, str(tmp_path), folder, str(workers)],
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )

  return run


def wait_for(condition: Callable[[], object], seconds: float = 100) -> object:
  end = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.005)
  return found


def list_children(process: subprocess.Popen) -> list[int]:
  path = f'/proc/{process.pid}/task/{process.pid}/children'
  children = pathlib.Path(path).read_text().split()
  commands = {
    int(child): pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
    for child in children
  }
  return [child for child, line in commands.items() if b'spawn_main' in line]


def list_parts(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.glob('*.incomplete/part-?????'))


def test_a_kill_costs_only_the_parts_that_are_not_whole(
  start, tokenize, tmp_path, monkeypatch
):
  process = start('killed', workers=2)
  wait_for(lambda: len(list_parts(tmp_path / 'killed')) > 3)
  children = list_children(process)
  process.kill()
  process.communicate()
  whole = list_parts(tmp_path / 'killed')
  shards = {
    part.name[-5:]: (part / 'train.array_record').stat().st_ino
    for part in whole
  }
  assert 3 < len(shards) < 40
  assert list_whole(tmp_path / 'killed') == []
  # Nobody is left who would write.
  wait_for(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in children))
  monkeypatch.setattr(parts, 'PART_RECORDS', 20)
  for folder in 'killed', 'other':
    tokenize([FileSource(tmp_path / 'a.jsonl')], folder)
  killed = read_files(tmp_path / 'killed')
  assert killed == read_files(tmp_path / 'other')
  # A file that was moved is the same file.
  moved = {
    path.name.split('-')[2]: path.stat().st_ino
    for path in tmp_path.glob('killed/*/records/tokens-train*')
  }
  assert shards.items() <= moved.items()
  assert len(moved) == 40


def test_a_killed_worker_ends_the_run_in_one_message(
  start, tokenize, tmp_path, monkeypatch
):
  process = start('killed', workers=2)
  wait_for(lambda: list_parts(tmp_path / 'killed'))
  os.kill(list_children(process)[0], signal.SIGKILL)
  error = process.communicate(timeout=100)[1]
  assert process.returncode == 1
  assert error.splitlines()[-1].startswith(
    'grit_jax.errors.UserError: a process that tokenizes was killed'
  )
  assert list_whole(tmp_path / 'killed') == []
  monkeypatch.setattr(parts, 'PART_RECORDS', 20)
  tokenize([FileSource(tmp_path / 'a.jsonl')], 'killed')
  assert len(list_whole(tmp_path / 'killed')) == 1


def test_several_processes_prepare_once(start, tmp_path):
  processes = [start('same', workers=1) for _ in range(2)]
  ends = [(*process.communicate(), process.returncode) for process in processes]
  assert ends == [(None, '', 0)] * 2
  (whole,) = list_whole(tmp_path / 'same')
  assert not list((tmp_path / 'same').glob('*.incomplete'))


def test_a_kill_while_merging_costs_nothing(
  tokenize, tmp_path, monkeypatch, count_encoded
):
  source = write_lines(tmp_path / 'a.jsonl', make_records(100))
  monkeypatch.setattr(parts, 'PART_RECORDS', 20)
  tokenize([source], 'other')
  rename, renamed = pathlib.Path.rename, []

  def interrupt(self, target):
    if self.name.endswith('.array_record'):
      renamed.append(self)
      if len(renamed) == 4:
        raise KeyboardInterrupt
    return rename(self, target)

  with monkeypatch.context() as context:
    context.setattr(pathlib.Path, 'rename', interrupt)
    with pytest.raises(KeyboardInterrupt):
      tokenize([source], 'killed')
  assert list_whole(tmp_path / 'killed') == []
  encoded = len(count_encoded)
  tokenize([source], 'killed')
  assert len(count_encoded) == encoded
  assert read_files(tmp_path / 'killed') == read_files(tmp_path / 'other')


def test_parts_of_what_a_file_was_are_removed(prepare, tmp_path):
  path = tmp_path / 'a.jsonl'
  with pytest.raises(RecordError):
    prepare(write_lines(path, [*make_records(2000), 'oops']))
  write_lines(path, make_records(20))
  prepare(FileSource(path))
  folders = [p for p in (tmp_path / 'prepared').iterdir() if p.is_dir()]
  assert len(folders) == 1


def test_parts_that_were_cut_otherwise_are_written_anew(
  tokenize, tmp_path, monkeypatch
):
  lines = make_records(100)
  source = write_lines(tmp_path / 'a.jsonl', [*lines[:90], 'oops', *lines[90:]])
  monkeypatch.setattr(parts, 'PART_RECORDS', 20)
  with pytest.raises(RecordError):
    tokenize([source], 'kept')
  assert len(list_parts(tmp_path / 'kept')) == 4
  monkeypatch.setattr(parts, 'PART_RECORDS', 30)
  for folder in 'kept', 'other':
    tokenize([source], folder, on_error='skip')
  assert read_files(tmp_path / 'kept') == read_files(tmp_path / 'other')


def test_processes_do_not_import_the_main_module(tmp_path, model_bytes):
  (tmp_path / 'tokenizer.model').write_bytes(model_bytes)
  write_lines(tmp_path / 'a.jsonl', make_records(60))
  program = PROGRAM.format(settings=SETTINGS)
  indented = program.replace('\n', '\n  ')
  (tmp_path / 'started.py').write_text(
    'import os\n'
    "open(f'imported-{os.getpid()}', 'w').close()\n"
    f"if __name__ == '__main__':\n  {indented}\n"
  )
  path = os.pathsep.join([str(ROOT), *sys.path])
  environment = dict(os.environ, PYTHONPATH=path)
  subprocess.run(
    [sys.executable, '-m', 'started', str(tmp_path), 'prepared', '2'],
    cwd=tmp_path,
    env=environment,
    check=True,
  )
  assert len(list_whole(tmp_path / 'prepared')) == 1
  assert len(list(tmp_path.glob('imported-*'))) == 1


def test_every_damage_of_a_part_is_named(tokenize, tmp_path, monkeypatch):
  source = write_lines(tmp_path / 'a.jsonl', make_records(20))
  with monkeypatch.context() as context:
    context.setattr(merging, 'merge', lambda *_: None)
    context.setattr(tokenization, 'publish', lambda *_: None)
    context.setattr(tokenization.shutil, 'rmtree', lambda *_, **__: None)
    tokenize([source], 'out')
  [path] = (tmp_path / 'out').rglob('part.json')
  check_every_damage_is_named(
    path,
    lambda: parts.read_part(path.parent),
    unread=['made_of/.*', r'splits/.*/report/.*/.*', '.*/fewest_negatives.*'],
  )
