"""A small run of the training command, for tests: its data and its config."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

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
    model=dataclasses.replace(presets.tiny(), vocab_size=0),
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
