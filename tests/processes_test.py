"""Runs of several real processes, which talk over the loopback."""

import json
import os
import pathlib
import signal
import socket
import subprocess

import numpy as np
import pytest
from small_run import (
  make_config,
  read_metrics,
  start,
  wait_for_step,
  write_config,
  write_records,
)

from grit_jax import processes
from grit_jax.processes import ProcessError
from grit_jax.train import STOPPED

DEVICES = 4
COMMON = (
  '--config.mesh.data=2',
  '--config.mesh.fsdp=2',
  '--config.steps=20',
  '--config.evaluation.every_steps=8',
)
SELDOM = '--config.checkpoint.every_steps=50'
# The same program on the same mesh: only sums over devices are in another
# order, in float32.
TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> pathlib.Path:
  place = tmp_path_factory.mktemp('processes')
  (place / 'records').mkdir()
  write_records(place / 'records')
  return write_config(make_config(place / 'records'), place / 'config.py')


def start_all(
  config: pathlib.Path, workdir: pathlib.Path, count: int, *flags: str
) -> list[subprocess.Popen]:
  """Starts the processes of a run, which share four devices."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  return [
    start(
      config,
      workdir,
      *COMMON,
      f'--coordinator_address={address}',
      f'--num_processes={count}',
      f'--process_id={number}',
      *flags,
      devices=DEVICES // count,
    )
    for number in range(count)
  ]


def finish(running: list[subprocess.Popen]) -> list[tuple[int, str]]:
  """Waits for all; the exit code and the output of each."""
  outputs = [process.communicate(timeout=300)[0] for process in running]
  return [
    (process.returncode, output)
    for process, output in zip(running, outputs, strict=True)
  ]


def test_processes_train_as_one_and_go_on_in_another_number(config, tmp_path):
  alone = tmp_path / 'alone'
  process = start(config, alone, *COMMON, devices=DEVICES)
  [(code, output)] = finish([process])
  assert code == 0, output

  run = tmp_path / 'run'
  # A signal to one of four: all stop at one step, which is saved.
  four = start_all(config, run, 4, SELDOM)
  wait_for_step(run, 1, four[0])
  four[2].send_signal(signal.SIGTERM)
  (code, output), *others = finish(four)
  codes = [code, *(code for code, _ in others)]
  assert codes == [STOPPED] * 4, (output, others)
  assert 'Stopped by a signal' in output
  [saved] = os.listdir(run / 'checkpoints')

  # One of two is killed: the other ends too.
  two = start_all(config, run, 2, SELDOM)
  wait_for_step(run, int(saved) + 2, two[0])
  two[1].kill()
  for number, (code, output) in enumerate(finish(two)):
    assert code != 0, (number, output)

  (code, output), (other_code, other_output) = finish(
    start_all(config, run, 2, SELDOM)
  )
  assert (code, other_code) == (0, 0), (output, other_output)
  assert f'Going on from {run}/checkpoints/{saved}' in output
  # The first alone says what is said once.
  assert 'generated:' in output and 'generated:' not in other_output

  for found, expected in zip(
    read_metrics(run), read_metrics(alone), strict=True
  ):
    assert found.keys() == expected.keys()
    for name in expected:
      np.testing.assert_allclose(
        found[name], expected[name], rtol=TOLERANCE, err_msg=name
      )
  found, expected = (
    json.loads((workdir / 'evaluation.json').read_text())
    for workdir in (run, alone)
  )
  for row in expected:
    for name, value in expected[row].items():
      np.testing.assert_allclose(
        found[row][name], value, rtol=TOLERANCE, err_msg=f'{row} {name}'
      )


def test_processes_with_other_data_end_in_a_message(config, tmp_path):
  """Each has a disk of its own, and on one of them the records differ."""
  lines = (config.parent / 'records' / 'pairs.jsonl').read_text().splitlines()
  running = []
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  for number in range(2):
    # The processes have one path, which leads each to its own records.
    home = tmp_path / str(number)
    (home / 'records').mkdir(parents=True)
    text = '\n'.join(lines[10 * number :]) + '\n'
    (home / 'records' / 'pairs.jsonl').write_text(text)
    running.append(
      start(
        config,
        tmp_path / 'run',
        '--config.objective.mode=embedding',
        '--config.evaluation.enabled=False',
        '--config.data.paths=records',
        '--config.data.cache_dir=data',
        f'--coordinator_address={address}',
        '--num_processes=2',
        f'--process_id={number}',
        home=home,
      )
    )
  for code, output in finish(running):
    assert code == 1, output
    assert 'grit_jax: error: the prepared data: that of process 1' in output
    assert 'Traceback' not in output


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('127.0.0.1:1', 2, None), '--process_id missing'),
    ((None, 2, 0), '--coordinator_address missing'),
    (('127.0.0.1:1', 2, 2), r'--process_id=2 is not in 0 to 1'),
    (('127.0.0.1', 2, 0), '--coordinator_address=127.0.0.1 is not HOST:PORT'),
  ],
)
def test_flags_that_cannot_be_are_named(flags, message):
  with pytest.raises(ProcessError, match=message):
    processes.start_processes(*flags)
