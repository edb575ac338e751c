"""Tests of the command that prepares data, and of runs on what it leaves."""

import argparse
import dataclasses
import inspect
import io
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
import sentencepiece
from json_damage import check_every_damage_is_named

from grit_jax.config import (
  Config,
  DataConfig,
  EvaluationConfig,
  ObjectiveConfig,
)
from grit_jax.data import preparation, prepare, records
from grit_jax.data.preparation import make_settings
from grit_jax.data.records import RecordError
from grit_jax.data.sources import HELD_OUT, TRAIN, sources
from grit_jax.data.tokenizer import TokenizerError, load_tokenizer
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.errors import ConfigError, UserError
from grit_jax.files import lock

ROOT = pathlib.Path(__file__).parents[2]
PNG = b'\x89PNG\r\n\x1a\n'
FLAGS = (
  '--max_query_tokens=24',
  '--max_passage_tokens=32',
  '--max_generative_tokens=40',
  '--held_out_fraction=0.2',
)


def write_raw(folder: pathlib.Path, model_bytes: bytes) -> pathlib.Path:
  """Writes raw data of both kinds, with a tokenizer beside it."""
  (folder / 'tokenizer.model').write_bytes(model_bytes)
  raw = folder / 'raw'
  raw.mkdir()
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
    (raw / f'{name}.jsonl').write_text(text)
  return raw


def make_config(folder: pathlib.Path) -> Config:
  """What FLAGS say, of data that is prepared already."""
  return Config(
    data=DataConfig(
      paths=str(folder / 'prepared'),
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


def prepare_raw(raw: pathlib.Path, config: Config) -> pathlib.Path:
  """Prepares a folder of raw data to where the configuration has its own."""
  tokenizer = str(raw.parent / 'tokenizer.model')
  target = config.data.paths
  prepare.prepare(change(config, paths=str(raw), tokenizer=tokenizer), target)
  return pathlib.Path(target)


@pytest.fixture
def raw(tmp_path: pathlib.Path, model_bytes: bytes) -> pathlib.Path:
  """A folder of raw data, for a test to change."""
  return write_raw(tmp_path, model_bytes)


@pytest.fixture
def config(tmp_path: pathlib.Path) -> Config:
  """The configuration of what is prepared from `raw`."""
  return make_config(tmp_path)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Data that all tests here share, and change nothing of."""

  raw: pathlib.Path
  config: Config
  folder: pathlib.Path


@pytest.fixture(scope='module')
def prepared(
  tmp_path_factory: pytest.TempPathFactory, model_bytes: bytes
) -> Prepared:
  """Raw data, and what is prepared from it."""
  folder = tmp_path_factory.mktemp('shared')
  raw, config = write_raw(folder, model_bytes), make_config(folder)
  return Prepared(raw, config, prepare_raw(raw, config))


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


def make_flags(folder: pathlib.Path, *flags: str) -> list[str]:
  """The flags that prepare the raw data in a folder."""
  return [
    f'--source={folder}/raw',
    f'--tokenizer={folder}/tokenizer.model',
    f'--target={folder}/prepared',
    *flags,
  ]


def start_command(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'grit_jax.data.prepare', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.fixture
def run_command(tmp_path: pathlib.Path) -> Callable:
  """Runs the command here on the raw data; returns what it ends with."""

  def run(*given: str) -> str | None:
    flags = prepare.make_parser().parse_args(make_flags(tmp_path, *given))
    try:
      prepare.prepare(prepare.make_config(flags), flags.target)
    except UserError as error:
      return str(error)
    return None

  return run


def test_the_command_prepares_and_reports(raw, tmp_path):
  done = start_command(*make_flags(tmp_path))
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


def test_faults_are_one_message(raw, tmp_path, run_command, capsys):
  with (raw / 'pairs.jsonl').open('a') as file:
    file.write('oops\n')
  done = start_command(*make_flags(tmp_path, *FLAGS))
  assert done.returncode == 1
  assert done.stderr == (
    f'grit_jax: error: {raw}/pairs.jsonl:61: not valid JSON: Expecting value '
    'at column 1\n'
  )
  assert not (tmp_path / 'prepared/prepared.json').exists()
  skip = '--on_error=skip', '--max_skipped_fraction=0.02'
  assert run_command(*FLAGS, *skip) is None
  printed = capsys.readouterr().out
  assert 'pairs: skipped 1: not valid JSON\n' in printed
  assert f'  {raw}/pairs.jsonl:61: not valid JSON' in printed
  assert 'chats: dropped 1: no answer within the limit' in printed


@pytest.mark.parametrize('limit', [200, 5_000])
def test_a_full_disk_is_one_message_and_leaves_nothing_whole(
  raw, tmp_path, run_command, capsys, limit
):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    message = run_command(*FLAGS)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  target = tmp_path / 'prepared'
  assert message.startswith(f'{target}: cannot write: ')
  assert '\n' not in message and not capsys.readouterr().err
  assert 'File too large' in message and 'make room' in message
  assert not list(target.glob('*/dataset.json'))
  assert not (target / 'prepared.json').exists()
  assert run_command(*FLAGS) is None
  assert len(list(target.glob('*/dataset.json'))) == 2


def test_a_mistake_in_a_flag_is_named(raw, run_command):
  with pytest.raises(ConfigError, match=r'--held_out_fraction: .* in \[0, 1\)'):
    run_command('--held_out_fraction=1.5')


def test_source_and_target_must_differ(raw, config):
  tokenizer = str(raw.parent / 'tokenizer.model')
  with pytest.raises(ConfigError, match='is both source and target'):
    prepare.prepare(
      change(config, paths=f'{raw}/.', tokenizer=tokenizer), str(raw)
    )


def test_a_second_command_is_refused(raw, tmp_path, run_command):
  target = tmp_path / 'prepared'
  target.mkdir()
  with lock(target / '.lock'):
    assert run_command(*FLAGS).startswith(f'{target}: process {os.getpid()} on')
  assert os.listdir(target) == ['.lock']


def test_prepared_data_is_not_prepared_again(prepared, tmp_path):
  tokenizer = str(prepared.raw.parent / 'tokenizer.model')
  config = change(prepared.config, tokenizer=tokenizer)
  with pytest.raises(
    ConfigError, match=f'{prepared.folder} is already prepared'
  ):
    prepare.prepare(config, str(tmp_path / 'b'))


def test_the_report_and_the_histograms_describe_the_data(prepared, open_data):
  config = prepared.config
  report = json.loads((prepared.folder / 'report.json').read_text())
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
  assert (prepared.folder / 'lengths.png').read_bytes().startswith(PNG)


def test_a_run_sees_the_same_data_prepared_and_raw(prepared, open_data):
  raw, config = prepared.raw, prepared.config
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


def test_a_prepared_folder_needs_nothing_else(config, raw, open_data, tmp_path):
  prepared = prepare_raw(raw, config)
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


def test_prepared_and_raw_data_may_be_mixed(prepared, open_data, tmp_path):
  more = tmp_path / 'more.jsonl'
  shutil.copy(prepared.raw / 'pairs.jsonl', more)
  both = change(prepared.config, paths=f'{more},{prepared.folder}')
  names = [dataset.name for dataset in open_data(both)['embedding']]
  assert names == ['more', 'pairs']


def test_what_the_mode_lacks_need_not_fit(prepared, open_data):
  config = change(prepared.config, max_generative_tokens=33)
  with pytest.raises(ConfigError, match='data.max_generative_tokens=33'):
    open_data(config)
  mode = ObjectiveConfig(mode='embedding')
  opened = open_data(dataclasses.replace(config, objective=mode))
  assert not opened['generative'] and opened['embedding']


@pytest.mark.parametrize(
  'key', ['max_query_tokens', 'max_passage_tokens', 'max_generative_tokens']
)
def test_another_limit_is_named(prepared, open_data, key):
  expected = f'^data.{key}=16, but {prepared.folder} was prepared with '
  with pytest.raises(ConfigError, match=expected):
    open_data(change(prepared.config, **{key: 16}))


def test_another_held_out_fraction_is_named(prepared, open_data):
  evaluation = EvaluationConfig(held_out_fraction=0.1)
  with pytest.raises(ConfigError, match='^evaluation.held_out_fraction=0.1, '):
    open_data(dataclasses.replace(prepared.config, evaluation=evaluation))


def test_another_tokenizer_is_named(prepared, open_data, tmp_path):
  other = tmp_path / 'other.model'
  other.write_bytes(train_tokenizer(['some other text ' * 20], 280))
  config = change(prepared.config, tokenizer=str(other))
  with pytest.raises(ConfigError, match=f'^data.tokenizer={str(other)!r}: '):
    open_data(config, tokenizer=load_tokenizer(other))


def test_more_negatives_than_prepared_data_has_are_named(prepared, open_data):
  with pytest.raises(RecordError, match='neg: found 1 negatives, expected 2'):
    open_data(change(prepared.config, num_passages=3))


def test_a_file_that_changed_after_preparation_is_named(config, raw, open_data):
  prepared = prepare_raw(raw, config)
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
  prepare_raw(raw, skip)
  open_data(skip)
  with pytest.raises(ConfigError, match="^data.on_error='stop', but 1 records"):
    open_data(change(skip, on_error='stop'))
  with pytest.raises(RecordError, match='max_skipped_fraction=0.01'):
    open_data(change(skip, max_skipped_fraction=0.01))


def test_another_version_is_refused(prepared, open_data, tmp_path):
  copy = shutil.copytree(prepared.folder, tmp_path / 'copy')
  path = copy / 'prepared.json'
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, 'format': 1}))
  with pytest.raises(RecordError, match='prepared.json: found format 1'):
    open_data(change(prepared.config, paths=str(copy)))


def test_without_held_out_records_nothing_is_evaluated(raw, config, open_data):
  evaluation = EvaluationConfig(held_out_fraction=0.0)
  config = dataclasses.replace(config, evaluation=evaluation)
  prepare_raw(raw, config)
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


@pytest.mark.parametrize(
  'name', ['prepared', 'chats-*/dataset', 'pairs-*/dat*']
)
def test_every_damage_of_a_json_file_is_named(
  prepared, tmp_path, open_data, name
):
  folder = shutil.copytree(prepared.folder, tmp_path / 'prepared')
  config = change(prepared.config, paths=str(folder))
  [path] = folder.glob(f'{name}.json')
  check_every_damage_is_named(
    path,
    lambda: [open_data(config, split) for split in (TRAIN, HELD_OUT)],
    unread=[
      'settings/(min_negatives|on_error|max_skipped_fraction)',
      'identity/(format|tokenizer|limits.*)',
      'source/state/.*',
      'splits/.*/fewest_negatives',
      'splits/.*/report/(dropped|skipped|faults)/.*',
    ],
  )


def test_a_tokenizer_that_no_export_can_have_is_refused_at_the_start(
  raw, tmp_path, run_command, config
):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(inspect.getsource(argparse).splitlines()),
    model_writer=model, model_type='unigram', vocab_size=600,
    byte_fallback=True, unk_id=0,
    bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name='identity',
    remove_extra_whitespaces=False, minloglevel=2,
  )  # fmt: skip
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(model.getvalue())
  assert 'cannot be written as a tokenizer.json' in run_command(*FLAGS)
  assert not (tmp_path / 'prepared').exists()
  with pytest.raises(TokenizerError, match='cannot be written as a tokenizer'):
    preparation.fit_vocabulary(config, load_tokenizer(path))
