"""Tests of the command that prepares data, and of runs on what it leaves."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from grit_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  EvaluationConfig,
  ObjectiveConfig,
)
from grit_jax.data import preparation, prepare, records
from grit_jax.data.preparation import make_settings
from grit_jax.data.records import RecordError
from grit_jax.data.sources import HELD_OUT, TRAIN, sources
from grit_jax.data.tokenizer import load_tokenizer
from grit_jax.data.tokenizer_training import train_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
PNG = b'\x89PNG\r\n\x1a\n'
FLAGS = (
  '--max_query_tokens=24',
  '--max_passage_tokens=32',
  '--max_generative_tokens=40',
  '--held_out_fraction=0.2',
)


@pytest.fixture
def raw(tmp_path: pathlib.Path, model_bytes: bytes) -> pathlib.Path:
  """A folder of raw data of both kinds, with a tokenizer beside it."""
  (tmp_path / 'tokenizer.model').write_bytes(model_bytes)
  folder = tmp_path / 'raw'
  folder.mkdir()
  pairs = [
    {
      'query': ['Find', f'query {i}'],
      'pos': [['', 'positive ' * (i % 30 + 1)]],
      'neg': [f'negative {i}'] * (1 + i % 2),
    }
    for i in range(60)
  ]
  chats = [{'text': [f'user {i}', 'answer ' * (i % 40 + 1)]} for i in range(50)]
  chats.append({'text': ['long ' * 60, 'never seen']})
  for name, lines in ('pairs', pairs), ('chats', chats):
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (folder / f'{name}.jsonl').write_text(text)
  return folder


@pytest.fixture
def config(tmp_path: pathlib.Path, raw: pathlib.Path) -> Config:
  """What FLAGS say, of data that is prepared already."""
  return Config(
    data=DataConfig(
      paths=str(tmp_path / 'prepared'),
      max_query_tokens=24,
      max_passage_tokens=32,
      max_generative_tokens=40,
      row_length=64,
    ),
    evaluation=EvaluationConfig(held_out_fraction=0.2),
  )


def change(config: Config, **data: object) -> Config:
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, **data)
  )


@pytest.fixture
def prepared(config: Config, raw: pathlib.Path) -> pathlib.Path:
  """A prepared folder of that data."""
  target = config.data.paths
  tokenizer = str(raw.parent / 'tokenizer.model')
  prepare.prepare(change(config, paths=str(raw), tokenizer=tokenizer), target)
  return pathlib.Path(target)


@pytest.fixture
def open_data(tmp_path: pathlib.Path) -> Callable:
  """Does what a run does with data."""

  def run(config: Config, split: str = TRAIN, tokenizer=None):
    found = sources(config.data.paths, tmp_path / 'tfds')
    preparation.check_kinds(config, found)
    if tokenizer is None:
      tokenizer = preparation.train_or_load_tokenizer(config, tmp_path, found)
    return preparation.prepare_data(config, tmp_path, found, tokenizer, split)

  return run


def run_command(
  folder: pathlib.Path, *flags: str, limit: int | None = None
) -> subprocess.CompletedProcess:
  """Runs the command on the raw data in a folder; `limit` is of files."""

  def set_limit() -> None:
    if limit:
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

  return subprocess.run(
    [
      sys.executable,
      '-m',
      'grit_jax.data.prepare',
      f'--source={folder}/raw',
      f'--tokenizer={folder}/tokenizer.model',
      f'--target={folder}/prepared',
      *flags,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    preexec_fn=set_limit,
  )


def test_the_command_prepares_and_reports(raw, tmp_path):
  done = run_command(tmp_path)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0].split()[:4] == ['data', 'set', 'kind', 'records']
  assert [line.split()[:2] for line in lines[1:3]] == [
    ['chats', 'generative'],
    ['pairs', 'embedding'],
  ]
  assert lines[-1].endswith(f'--config.data.paths={tmp_path}/prepared')
  # The flags that are not given have the defaults of the configuration.
  manifest = json.loads((tmp_path / 'prepared/prepared.json').read_text())
  assert manifest['settings'] == dataclasses.asdict(make_settings(Config()))


def test_faults_are_one_message(raw, tmp_path):
  with (raw / 'pairs.jsonl').open('a') as file:
    file.write('oops\n')
  done = run_command(tmp_path, *FLAGS)
  assert done.returncode == 1
  assert done.stderr == (
    f'grit_jax: error: {raw}/pairs.jsonl:61: not valid JSON: Expecting value '
    'at column 1\n'
  )
  assert not (tmp_path / 'prepared/prepared.json').exists()
  done = run_command(
    tmp_path, *FLAGS, '--on_error=skip', '--max_skipped_fraction=0.02'
  )
  assert done.returncode == 0, done.stderr
  assert 'pairs: skipped 1: not valid JSON\n' in done.stdout
  assert f'  {raw}/pairs.jsonl:61: not valid JSON' in done.stdout
  assert 'chats: dropped 1: no answer within the limit' in done.stdout


@pytest.mark.parametrize('limit', [200, 5_000])
def test_a_full_disk_is_one_message_and_leaves_nothing_whole(
  raw, tmp_path, limit
):
  done = run_command(tmp_path, *FLAGS, limit=limit)
  assert done.returncode == 1
  target = tmp_path / 'prepared'
  assert done.stderr.startswith(f'grit_jax: error: {target}: cannot write: ')
  assert done.stderr.count('\n') == 1
  assert 'File too large' in done.stderr and 'make room' in done.stderr
  assert not list(target.glob('*/dataset.json'))
  assert not (target / 'prepared.json').exists()
  done = run_command(tmp_path, *FLAGS)
  assert done.returncode == 0, done.stderr
  assert len(list(target.glob('*/dataset.json'))) == 2


def test_a_mistake_in_a_flag_is_named(raw, tmp_path):
  done = run_command(tmp_path, '--held_out_fraction=1.5')
  assert done.returncode == 1
  assert 'held_out_fraction=1.5 is not in [0, 1)' in done.stderr


def test_source_and_target_must_differ(raw, config):
  tokenizer = str(raw.parent / 'tokenizer.model')
  with pytest.raises(ConfigError, match='is both source and target'):
    prepare.prepare(
      change(config, paths=f'{raw}/.', tokenizer=tokenizer), str(raw)
    )


def test_prepared_data_is_not_prepared_again(prepared, config, raw, tmp_path):
  tokenizer = str(raw.parent / 'tokenizer.model')
  with pytest.raises(ConfigError, match=f'{prepared} is already prepared'):
    prepare.prepare(change(config, tokenizer=tokenizer), str(tmp_path / 'b'))


def test_the_report_and_the_histograms_describe_the_data(
  prepared, open_data, config
):
  report = json.loads((prepared / 'report.json').read_text())
  by_name = {entry['name']: entry for entry in report['data_sets']}
  for split in TRAIN, HELD_OUT:
    opened = open_data(config, split)
    for dataset in opened['embedding'] + opened['generative']:
      found = by_name[dataset.name]['splits'][split]
      assert found == dataclasses.asdict(dataset.report)
      assert found['records'] == len(dataset)
      assert found['tokens'] == dataset.lengths.sum()
  assert (
    sum(
      split['dropped'].get('no answer within the limit of tokens', 0)
      for split in by_name['chats']['splits'].values()
    )
    == 1
  )
  lengths = by_name['pairs']['lengths']
  both = [
    open_data(config, split)['embedding'][0] for split in (TRAIN, HELD_OUT)
  ]
  queries = np.concatenate([d.lengths[d.offsets[:-1]] for d in both])
  texts = np.concatenate([d.lengths for d in both])
  assert lengths['queries']['count'] == 60
  assert lengths['queries']['mean'] == round(queries.mean(), 1)
  assert lengths['passages']['count'] == len(texts) - 60
  assert lengths['passages']['longest'] == 32
  assert lengths['passages']['mean'] == round(
    (texts.sum() - queries.sum()) / (len(texts) - 60), 1
  )
  assert (prepared / 'lengths.png').read_bytes().startswith(PNG)


def test_a_run_sees_the_same_data_prepared_and_raw(
  prepared, config, raw, open_data, tmp_path
):
  tokenizer = load_tokenizer(raw.parent / 'tokenizer.model')
  for split in TRAIN, HELD_OUT:
    ours = open_data(config, split)
    theirs = open_data(change(config, paths=str(raw)), split, tokenizer)
    for kind in records.EMBEDDING, records.GENERATIVE:
      (a,), (b,) = ours[kind], theirs[kind]
      assert a.lengths.tolist() == b.lengths.tolist()
      assert a.record_ids.tolist() == b.record_ids.tolist()
      assert [a.where(i) for i in range(3)] == [b.where(i) for i in range(3)]
      assert (a.name, a.kind, a.report) == (b.name, b.kind, b.report)


def test_a_prepared_folder_needs_nothing_else(
  prepared, config, raw, open_data, tmp_path
):
  place = open_data(config)['embedding'][0].where(0)
  moved = tmp_path / 'elsewhere'
  prepared.rename(moved)
  shutil.rmtree(raw)
  (tmp_path / 'tokenizer.model').unlink()
  data = open_data(change(config, paths=str(moved)))
  assert len(data['embedding']) == len(data['generative']) == 1
  assert data['embedding'][0].where(0) == place
  assert place.startswith(f'{raw}/pairs.jsonl:')
  assert len(data['embedding'][0].read([0])[0]) >= 3


def test_prepared_and_raw_data_may_be_mixed(
  prepared, config, raw, open_data, tmp_path
):
  more = tmp_path / 'more.jsonl'
  shutil.copy(raw / 'pairs.jsonl', more)
  both = change(config, paths=f'{more},{prepared}')
  names = [dataset.name for dataset in open_data(both)['embedding']]
  assert names == ['more', 'pairs']


def test_what_the_mode_lacks_need_not_fit(prepared, config, open_data):
  config = change(config, max_generative_tokens=33)
  with pytest.raises(ConfigError, match='data.max_generative_tokens=33'):
    open_data(config)
  mode = ObjectiveConfig(mode='embedding')
  opened = open_data(dataclasses.replace(config, objective=mode))
  assert not opened['generative'] and opened['embedding']


@pytest.mark.parametrize(
  'key', ['max_query_tokens', 'max_passage_tokens', 'max_generative_tokens']
)
def test_another_limit_is_named(prepared, config, open_data, key):
  expected = f'^data.{key}=16, but {prepared} was prepared with '
  with pytest.raises(ConfigError, match=expected):
    open_data(change(config, **{key: 16}))


def test_another_held_out_fraction_is_named(prepared, config, open_data):
  evaluation = EvaluationConfig(held_out_fraction=0.1)
  with pytest.raises(ConfigError, match='^evaluation.held_out_fraction=0.1, '):
    open_data(dataclasses.replace(config, evaluation=evaluation))


def test_another_tokenizer_is_named(prepared, config, open_data, tmp_path):
  other = tmp_path / 'other.model'
  other.write_bytes(train_tokenizer(['some other text ' * 20], 280))
  config = change(config, tokenizer=str(other))
  with pytest.raises(ConfigError, match=f'^data.tokenizer={str(other)!r}: '):
    open_data(config, tokenizer=load_tokenizer(other))


def test_more_negatives_than_prepared_data_has_are_named(
  prepared, config, open_data
):
  with pytest.raises(RecordError, match='neg: found 1 negatives, expected 2'):
    open_data(change(config, num_passages=3))


def test_a_file_that_changed_after_preparation_is_named(
  prepared, config, raw, open_data
):
  path = raw / 'chats.jsonl'
  os.utime(path, (1, 1))
  open_data(config)  # Another time, but the same content.
  path.write_text(path.read_text() + '{"text": "one more"}\n')
  expected = f'^{path}: changed since {prepared} was prepared from it; prepare'
  with pytest.raises(RecordError, match=expected):
    open_data(config)
  path.unlink()
  open_data(config)


def test_skipped_records_need_on_error_skip(raw, config, open_data):
  with (raw / 'pairs.jsonl').open('a') as file:
    file.write('oops\n')
  skip = change(config, on_error='skip', max_skipped_fraction=0.02)
  tokenizer = str(raw.parent / 'tokenizer.model')
  prepare.prepare(
    change(skip, paths=str(raw), tokenizer=tokenizer), config.data.paths
  )
  open_data(skip)
  with pytest.raises(ConfigError, match="^data.on_error='stop', but 1 records"):
    open_data(change(skip, on_error='stop'))
  with pytest.raises(RecordError, match='max_skipped_fraction=0.01'):
    open_data(change(skip, max_skipped_fraction=0.01))


def test_another_version_is_refused(prepared, config, open_data):
  path = prepared / 'prepared.json'
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, 'format': 1}))
  with pytest.raises(RecordError, match='prepared.json: found format 1'):
    open_data(config)


def test_without_held_out_records_nothing_is_evaluated(
  prepared, config, raw, open_data
):
  evaluation = EvaluationConfig(held_out_fraction=0.0)
  config = dataclasses.replace(config, evaluation=evaluation)
  tokenizer = str(raw.parent / 'tokenizer.model')
  target = f'{config.data.paths}_whole'
  prepare.prepare(change(config, paths=str(raw), tokenizer=tokenizer), target)
  config = change(config, paths=target)
  assert open_data(config, HELD_OUT) == {'embedding': [], 'generative': []}
  assert len(open_data(config)['embedding'][0]) == 60


def test_a_faulty_record_trains_no_tokenizer_unless_it_is_skipped(
  raw, config, open_data
):
  (raw / 'pairs.jsonl').write_text('oops\n' + (raw / 'pairs.jsonl').read_text())
  config = change(config, paths=str(raw), tokenizer_pieces=300)
  with pytest.raises(RecordError, match='pairs.jsonl:1: not valid JSON'):
    open_data(config)
  skip = change(config, on_error='skip', max_skipped_fraction=0.1)
  assert len(open_data(skip)['embedding']) == 1
