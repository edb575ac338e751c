"""Runs of several real processes, which talk over the loopback."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess

import numpy as np
import pytest
from small_run import (
  make_config,
  read_metrics,
  run_here,
  start,
  wait_for_step,
  write_config,
  write_records,
)

from grit_jax import processes
from grit_jax.config import CheckpointConfig, Config, MeshConfig
from grit_jax.errors import UserError
from grit_jax.train import STOPPED

DEVICES = 4
# The same program on the same mesh: only sums over devices are in another
# order, in float32.
TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> Config:
  place = tmp_path_factory.mktemp('processes')
  write_records(place)
  config = make_config(place)
  return dataclasses.replace(
    config,
    mesh=MeshConfig(data=2, fsdp=2),
    checkpoint=CheckpointConfig(every_steps=50),
    evaluation=dataclasses.replace(config.evaluation, every_steps=8),
    steps=20,
  )


@pytest.fixture(scope='module')
def config_file(config, tmp_path_factory) -> pathlib.Path:
  return write_config(config, tmp_path_factory.mktemp('config') / 'config.py')


def start_two(
  config_file: pathlib.Path, workdir: pathlib.Path
) -> list[subprocess.Popen]:
  """Starts the processes of a run, which share four devices."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  return [
    start(
      config_file,
      workdir,
      f'--coordinator_address={address}',
      '--num_processes=2',
      f'--process_id={number}',
      devices=DEVICES // 2,
    )
    for number in range(2)
  ]


def finish(running: list[subprocess.Popen]) -> list[tuple[int, str]]:
  """Waits for all; the exit code and the output of each."""
  outputs = [process.communicate(timeout=300)[0] for process in running]
  return [
    (process.returncode, output)
    for process, output in zip(running, outputs, strict=True)
  ]


def assert_equal_metrics(
  workdir: pathlib.Path, reference: pathlib.Path
) -> None:
  for found, expected in zip(
    read_metrics(workdir), read_metrics(reference), strict=True
  ):
    assert found.keys() == expected.keys()
    for name in expected:
      np.testing.assert_allclose(
        found[name], expected[name], rtol=TOLERANCE, err_msg=name
      )
  found, expected = (
    json.loads((place / 'evaluation.json').read_text())
    for place in (workdir, reference)
  )
  for row in expected:
    for name, value in expected[row].items():
      np.testing.assert_allclose(
        found[row][name], value, rtol=TOLERANCE, err_msg=f'{row} {name}'
      )


@pytest.mark.e2e
def test_processes_train_as_one_and_go_on_in_another_number(
  config, config_file, tmp_path
):
  run = tmp_path / 'run'
  # A signal to one of two: both stop at one step, which is saved.
  two = start_two(config_file, run)
  wait_for_step(run, 1, two[0])
  two[1].send_signal(signal.SIGTERM)
  (code, output), other = finish(two)
  assert [code, other[0]] == [STOPPED] * 2, (output, other)
  assert 'Stopped by a signal' in output
  [saved] = os.listdir(run / 'checkpoints')
  stopped = tmp_path / 'stopped'
  shutil.copytree(run, stopped)

  # One is killed: the other ends too, after half a minute without a sign of
  # life. Meanwhile one process trains alone, and ends what two have begun.
  two = start_two(config_file, run)
  wait_for_step(run, int(saved) + 2, two[0])
  two[1].kill()
  alone = tmp_path / 'alone'
  run_here(config, alone, DEVICES)
  run_here(config, stopped, DEVICES)
  assert_equal_metrics(stopped, alone)
  for number, (code, output) in enumerate(finish(two)):
    assert code != 0, (number, output)

  (code, output), (other_code, other_output) = finish(
    start_two(config_file, run)
  )
  assert (code, other_code) == (0, 0), (output, other_output)
  assert f'Going on from {run}/checkpoints/{saved}' in output
  # The first alone says what is said once.
  assert 'generated:' in output and 'generated:' not in other_output

  assert_equal_metrics(run, alone)


@pytest.mark.e2e
def test_processes_with_other_data_end_in_a_message(
  config, config_file, tmp_path
):
  """Each has a disk of its own, and on one of them the records differ."""
  lines = (
    pathlib.Path(config.data.paths, 'pairs.jsonl').read_text().splitlines()
  )
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
        config_file,
        tmp_path / 'run',
        '--config.objective.mode=embedding',
        '--config.mesh.data=1',
        '--config.evaluation.enabled=False',
        '--config.evaluation.every_steps=0',
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
    (('127.0.0.1:x', 2, 0), '--coordinator_address=127.0.0.1:x is not HOST'),
    (('127.0.0.1:65536', 2, 0), ':65536 is not HOST:PORT'),
    (('no.invalid:9', 2, 0), '=no.invalid:9: no.invalid is not known'),
    (('a' * 70 + ':9', 2, 0), 'a:9: a+ is not known'),
  ],
)
def test_flags_that_cannot_be_are_named(flags, message):
  with pytest.raises(UserError, match=message):
    processes.start_processes(*flags)
