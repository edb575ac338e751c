"""Runs the batch file with programs that stand in for Slurm's."""

import os
import pathlib
import re
import subprocess

import pytest

BATCH = pathlib.Path(__file__).parents[2] / 'launch' / 'slurm' / 'train.sbatch'
ARGUMENTS = ['--config=a b.py', "it's", '"two"', '$HOME', '*', '']
# Runs the command, as srun does on each node, and ends with its status.
SRUN = """#!/bin/sh
[ "$1" = --kill-on-bad-exit=0 ] || exit 64
shift
exec "$@"
"""


@pytest.fixture
def batch(tmp_path):
  """Runs the file as sbatch would; returns its status and what it printed."""
  for name, text in (
    ('srun', SRUN),
    ('scontrol', f'#!/bin/sh\necho "$*" >> {tmp_path}/scontrol_calls\n'),
  ):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)

  def run(*command: str, tasks: str = '8') -> tuple[int, str]:
    environment = os.environ | {
      'PATH': f'{tmp_path}:{os.environ["PATH"]}',
      'SLURM_JOB_ID': '17',
      'SLURM_NTASKS_PER_NODE': tasks,
      'SLURM_GPUS_ON_NODE': '8',
    }
    result = subprocess.run(
      ['bash', BATCH, *command],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    return result.returncode, result.stdout

  return run


def read_options() -> dict[str, str]:
  """Returns the file's #SBATCH lines, which end where the script begins."""
  head = BATCH.read_text().partition('\nset -')[0]
  return dict(re.findall(r'^#SBATCH --([a-z-]+)=?(.*)$', head, re.MULTILINE))


def test_options_stand_before_the_script():
  assert BATCH.read_text().count('#SBATCH --') == len(read_options())


def test_a_process_has_a_gpu():
  options = read_options()
  assert options['gpus-per-node'] == options['ntasks-per-node']


def test_run_is_told_to_save_before_its_time_is_up():
  options = read_options()
  # Not `B:`, which would tell the batch shell alone.
  assert re.fullmatch('TERM@[0-9]+', options['signal'])
  assert int(options['signal'].partition('@')[2]) >= 120
  # It may queue again, and its log goes on.
  assert options['requeue'] == '' and options['open-mode'] == 'append'


def test_command_gets_its_arguments_as_they_are(batch):
  status, output = batch('printf', '<%s>', *ARGUMENTS)
  assert status == 0
  assert output == ''.join(f'<{argument}>' for argument in ARGUMENTS)


def test_run_that_has_ended_does_not_queue_again(batch, tmp_path):
  assert batch('true')[0] == 0
  assert not (tmp_path / 'scontrol_calls').exists()


def test_run_that_was_stopped_queues_again(batch, tmp_path):
  assert batch('sh', '-c', 'exit 143')[0] == 143
  assert (tmp_path / 'scontrol_calls').read_text() == 'requeue 17\n'


def test_run_that_fails_does_not_queue_again(batch, tmp_path):
  assert batch('sh', '-c', 'exit 3')[0] == 3
  assert not (tmp_path / 'scontrol_calls').exists()


def test_other_numbers_of_processes_and_gpus_are_refused(batch):
  status, output = batch('echo', 'started', tasks='4')
  assert status == 2 and 'started' not in output
  assert '--ntasks-per-node=4, but a node has 8 GPUs' in output


def test_a_batch_without_a_command_is_refused(batch):
  status, output = batch()
  assert status == 2 and 'no command' in output
