"""A small run of the training command, for tests: its data and its config."""

import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from etils import epath

from grit_jax import sharding, train
from grit_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvaluationConfig,
  ObjectiveConfig,
  OptimizerConfig,
)
from grit_jax.models import presets

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 6
TIMED = 'tokens_per_second'


def make_config(folder: pathlib.Path) -> Config:
  return Config(
    # Sizes that divide over eight devices, halved for two to a byte.
    model=dataclasses.replace(
      presets.tiny(), vocab_size=0, embed_dim=48, head_dim=32, mlp_dim=128
    ),
    objective=ObjectiveConfig(mixed_groups=2),
    data=DataConfig(
      paths=str(folder),
      tokenizer_pieces=300,
      embedding_batch=8,
      generative_batch=8,
      max_query_tokens=48,
      max_passage_tokens=64,
      max_generative_tokens=64,
      row_length=64,
      max_segments=4,
      row_buckets=1,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    checkpoint=CheckpointConfig(every_steps=2),
    evaluation=EvaluationConfig(
      held_out_fraction=0.3, rows=8, generated_tokens=4
    ),
    steps=STEPS,
    log_every=1,
  )


def write_records(folder: pathlib.Path) -> None:
  """Writes JSON-lines files of both kinds."""
  rng = np.random.default_rng(0)

  def words(count: int) -> str:
    return ' '.join(
      ''.join(rng.choice(list('abcdefgh'), rng.integers(1, 5)))
      for _ in range(count)
    )

  with open(folder / 'pairs.jsonl', 'w') as file:
    for _ in range(60):
      record = {
        'query': ['find it', words(3)],
        'pos': [['', words(5)]],
        'neg': [['', words(4)]],
      }
      file.write(json.dumps(record) + '\n')
  with open(folder / 'chats.jsonl', 'w') as file:
    for _ in range(60):
      file.write(json.dumps({'text': [words(4), words(3)]}) + '\n')


def write_config(config: Config, path: pathlib.Path) -> pathlib.Path:
  """Writes a config file as a user would have one."""
  path.write_text(
    'import ml_collections\n'
    'def get_config():\n'
    f'  return ml_collections.ConfigDict({dataclasses.asdict(config)!r})\n'
  )
  return path


def start(
  config: pathlib.Path,
  workdir: pathlib.Path,
  *flags: str,
  devices: int = 1,
  home: pathlib.Path = ROOT,
) -> subprocess.Popen:
  """Starts the command in a process with one device, as on a laptop."""
  environment = os.environ | {
    'JAX_NUM_CPU_DEVICES': str(devices),
    'PYTHONPATH': str(ROOT),
  }
  return subprocess.Popen(
    [
      sys.executable, '-m', 'grit_jax.train', f'--config={config}',
      f'--workdir={workdir}', *flags,
    ],
    cwd=home,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )  # fmt: skip


def run_here(
  config: Config, workdir: pathlib.Path, devices: int = 1
) -> dict[str, Any]:
  """Trains in this process, on the first of its devices."""
  first = jax.devices()[:devices]
  make_mesh = functools.partial(sharding.make_mesh, devices=first)
  with mock.patch.object(sharding, 'make_mesh', make_mesh):
    return train.train(config, epath.Path(workdir))


class Trained(NamedTuple):
  """A run that the command has left: do not change it, but a copy."""

  config: Config
  config_file: pathlib.Path
  workdir: pathlib.Path
  output: str


def train_once(place: pathlib.Path) -> Trained:
  """Runs the command, unless this or another process has done it."""
  place.mkdir(exist_ok=True)
  output = place / 'output'
  config = make_config(place / 'records')
  found = Trained(config, place / 'config.py', place / 'run', '')
  with open(place / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not output.exists():
      (place / 'records').mkdir()
      write_records(place / 'records')
      process = start(write_config(config, found.config_file), found.workdir)
      text, _ = process.communicate()
      assert process.returncode == 0, text
      output.write_text(text)
  return found._replace(output=output.read_text())


def copy_until(
  step: int, workdir: pathlib.Path, copy: pathlib.Path
) -> pathlib.Path:
  """Copies a run without its checkpoints of later steps."""
  shutil.copytree(workdir, copy)
  for checkpoint in (copy / 'checkpoints').iterdir():
    if int(checkpoint.name) > step:
      shutil.rmtree(checkpoint)
  return copy


def read_metrics(workdir: pathlib.Path) -> list[dict]:
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k != TIMED} for line in lines
  ]


def wait_for_step(workdir: pathlib.Path, step: int, process) -> None:
  """Waits until metrics.jsonl has the step."""
  path = workdir / 'metrics.jsonl'
  while process.poll() is None:
    whole = path.read_text().split('\n')[:-1] if path.exists() else []
    if any(json.loads(line)['step'] >= step for line in whole):
      return
    time.sleep(0.02)
  raise AssertionError(process.stdout.read())
