"""Tests of the shell that all commands run in."""

import argparse
import errno
import logging as standard
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest
from absl import logging
from small_run import ROOT

from grit_jax import cli
from grit_jax.config import Config, to_config_dict
from grit_jax.errors import ConfigError, UserError

QUICKSTART = ROOT / 'configs' / 'quickstart.py'


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
  """Leaves the process's logs as they were."""
  loggers = standard.getLogger(), logging.get_absl_logger()
  handler = logging.get_absl_handler()
  before = logging.get_verbosity(), handler.filters[:], loggers[0].handlers[:]
  levels = [logger.level for logger in loggers]
  yield
  verbosity, handler.filters, loggers[0].handlers = before
  logging.set_verbosity(verbosity)
  for logger, level in zip(loggers, levels, strict=True):
    logger.setLevel(level)


def run(
  capsys: pytest.CaptureFixture, error: BaseException | None, *argv: str
) -> tuple[int, str]:
  """Runs a command that raises; returns its exit code and its stderr."""

  def command(flags: argparse.Namespace) -> None:
    del flags
    if error is not None:
      raise error

  parser = cli.Parser(prog='command')
  parser.add_argument('--number', type=cli.parse_positive)
  parser.add_argument('--port', type=cli.parse_port)
  parser.add_argument('--folder', type=cli.parse_given)
  try:
    cli.run(
      parser, command, argv, stopped='stopped at {number}', less_memory='less'
    )
  except SystemExit as end:
    return end.code, capsys.readouterr().err
  return 0, capsys.readouterr().err


@pytest.mark.parametrize(
  ('error', 'status', 'message'),
  [
    (UserError('no such model'), 1, 'error: no such model'),
    (ConfigError('steps=0'), 2, 'error: steps=0'),
    (
      OSError(errno.ENOSPC, 'No space left on device', 'a/b'),
      1,
      'error: a/b: No space left on device',
    ),
    (FileNotFoundError('a is neither'), 1, 'error: a is neither'),
    (MemoryError(), 1, 'error: memory ran out. Less is taken by less.'),
    (
      jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 GB\nmore'),
      1,
      'error: memory ran out. Less is taken by less. RESOURCE_EXHAUSTED: 9 GB',
    ),
    (KeyboardInterrupt(), 128 + signal.SIGINT, 'stopped at None'),
  ],
)
def test_an_end_that_a_user_can_mend_is_one_line(
  capsys, error: BaseException, status: int, message: str
):
  assert run(capsys, error) == (status, f'grit_jax: {message}\n')


def test_a_reader_of_the_output_that_has_gone_is_no_error(capsys):
  assert run(capsys, BrokenPipeError()) == (128 + signal.SIGPIPE, '')


def test_verbosity_adds_the_traceback(capsys):
  status, text = run(capsys, UserError('no'), '--verbosity=1')
  assert status == 1
  assert 'Traceback' in text and text.endswith('grit_jax: error: no\n')


@pytest.mark.parametrize('error', [ValueError('ours'), RuntimeError('ours')])
def test_a_fault_of_ours_keeps_its_traceback(capsys, error: Exception):
  with pytest.raises(type(error), match='ours'):
    run(capsys, error)
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    run(capsys, jax.errors.JaxRuntimeError('INTERNAL: ours'))


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--number=0'], "'0' is not a whole number in [1, 2147483647]"),
    (['--number=1e3'], "'1e3' is not a whole number in [1,"),
    (['--number=2147483648'], "'2147483648' is not a whole number in [1,"),
    (['--port=65536'], "'65536' is not a whole number in [0, 65535]"),
    (['--port=-1'], "'-1' is not a whole number in [0, 65535]"),
    (['--folder='], 'argument --folder: it is empty'),
    (['--folder', ' '], 'argument --folder: it is empty'),
    (['--numb=1'], 'unrecognized arguments: --numb=1'),
    (['stray'], 'unrecognized arguments: stray'),
  ],
)
def test_a_command_line_that_cannot_be_is_one_line(capsys, argv, message):
  status, text = run(capsys, None, *argv)
  assert status == 2
  assert text.startswith('grit_jax: error: ') and text.count('\n') == 1
  assert message in text


def test_a_subcommand_takes_verbosity_before_and_after_its_name():
  parser = cli.Parser(prog='command')
  parser.add_subparsers(dest='command').add_parser('sub')
  for argv in ['--verbosity=1', 'sub'], ['sub', '--verbosity=1']:
    assert parser.parse_args(argv).verbosity == 1


def test_blanks_between_names_are_no_part_of_them():
  assert cli.split_names(' mmlu, gsm8k,') == ['mmlu', 'gsm8k']
  assert cli.split_names('') == []


def test_the_keys_of_a_config_are_changed_by_flags():
  found = cli.parse_config(
    [
      f'--config={QUICKSTART}',
      '--config.steps=7',
      '--config.data.paths',
      'a,b',
      '--noconfig.evaluation.enabled',
      '--config.lora.alpha=2',
    ]
  )
  assert (found.steps, found.data.paths) == (7, 'a,b')
  assert found.evaluation.enabled is False
  assert found.lora.alpha == 2


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    (
      '--config.optimizer.lerning_rate=1',
      '--config.optimizer.lerning_rate: there is no such key. Did you mean '
      'optimizer.learning_rate',
    ),
    ('--config.optimiser.clip_norm=1', 'Did you mean optimizer.clip_norm'),
    ('--config.steps=many', '--config.steps=many: invalid literal for int'),
    ('--config.steps=1.5', '--config.steps=1.5: invalid literal for int'),
    ('--config.evaluation.enabled=maybe', 'Non-boolean argument'),
    ('--config.optimizer=3', 'is not a dict'),
    ('stray', 'unknown arguments: stray'),
  ],
)
def test_a_flag_that_no_config_has_is_named(flag: str, message: str):
  with pytest.raises(ConfigError) as raised:
    cli.parse_config([f'--config={QUICKSTART}', flag])
  assert message in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (None, 'No such file'),
    ('def get_config(:\n', 'invalid syntax'),
    ('x = 1\n', 'it has no get_config()'),
    ('import missing\n', "No module named 'missing'"),
    ('1 / 0\n', 'division by zero'),
    ('def get_config():\n  raise KeyError("of mine")\n', 'of mine'),
    ('def get_config():\n  return 3\n', 'no get_config() that returns'),
  ],
)
def test_a_file_that_is_no_config_is_named(
  tmp_path: pathlib.Path, text: str | None, message: str
):
  path = tmp_path / f'config_{abs(hash(text))}.py'
  if text is not None:
    path.write_text(text)
  with pytest.raises(ConfigError) as raised:
    cli.parse_config([f'--config={path}'])
  assert message in str(raised.value) and str(path) in str(raised.value)
  assert '\n' not in str(raised.value)


def test_all_keys_of_a_config_are_known():
  config = to_config_dict(Config())
  keys = cli._list_keys(config)
  assert {'steps', 'data', 'data.paths', 'mesh.fsdp'} <= keys


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), 'the following arguments are required: --workdir'),
    (('--workdir=a', '--wrkdir=b'), '--wrkdir: there is no such flag. Did you'),
    (('--workdir=a',), '--config=FILE is missing'),
  ],
)
def test_the_training_command_refuses_its_flags(flags, message: str, capsys):
  from grit_jax import train

  with pytest.raises(SystemExit) as end:
    cli.run(train.make_parser(), train.start, flags, config=True)
  assert end.value.code == 2
  assert message in capsys.readouterr().err


def test_a_command_ends_so_in_a_process_of_its_own(tmp_path: pathlib.Path):
  done = subprocess.run(
    [
      sys.executable, '-m', 'grit_jax.train', f'--workdir={tmp_path / "run"}',
      f'--config={QUICKSTART}', '--config.lora.rnak=1',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert line.startswith('grit_jax: error: --config.lora.rnak: there is no')
  assert not (tmp_path / 'run').exists()


def test_the_figures_of_aot_have_a_place_before_minutes_are_spent(
  capsys, tmp_path
):
  from grit_jax.aot import __main__ as aot

  with pytest.raises(SystemExit) as end:
    cli.run(
      aot.make_parser(),
      aot.compile_ahead,
      [f'--config={QUICKSTART}', '--topology=v5e:2x4', f'--output={tmp_path}'],
      config=True,
    )
  assert end.value.code == 1
  assert f'{tmp_path}: cannot write: it is a folder.' in capsys.readouterr().err
