"""Traces of small runs of the training command's own loop."""

import collections
import dataclasses
import json
import pathlib
import re

import jax
import pytest
from etils import epath
from small_run import start, write_config

from grit_jax import train
from grit_jax.config import (
  Config,
  DataConfig,
  EvaluationConfig,
  ObjectiveConfig,
  ProfileConfig,
)
from grit_jax.models import presets

STEPS = 8


def make_config(folder: pathlib.Path, steps: str) -> Config:
  """A run of `STEPS` steps on 16 records of each kind."""
  with open(folder / 'pairs.jsonl', 'w') as file:
    for number in range(16):
      record = {'query': f'what is {number}', 'pos': [f'it is {number}']}
      file.write(json.dumps(record | {'neg': [f'not {number}']}) + '\n')
  with open(folder / 'chats.jsonl', 'w') as file:
    for number in range(16):
      file.write(json.dumps({'text': [f'say {number}', f'{number}']}) + '\n')
  return Config(
    model=dataclasses.replace(presets.tiny(), vocab_size=0, num_layers=1),
    objective=ObjectiveConfig(mixed_groups=1),
    data=DataConfig(
      paths=str(folder),
      tokenizer_pieces=280,
      embedding_batch=8,
      generative_batch=8,
      max_query_tokens=32,
      max_passage_tokens=32,
      max_generative_tokens=32,
      row_length=32,
      max_segments=4,
      row_buckets=1,
    ),
    evaluation=EvaluationConfig(enabled=False, held_out_fraction=0.0),
    profile=ProfileConfig(steps=steps),
    steps=STEPS,
    log_every=1,
  )


@pytest.fixture(scope='module')
def trace(tmp_path_factory) -> pathlib.Path:
  """The one file that a run leaves which traces its steps 3 and 4."""
  folder = tmp_path_factory.mktemp('run')
  # A program of the compilation cache has the names of those who compiled it.
  in_key = 'jax_compilation_cache_include_metadata_in_key'
  jax.config.update(in_key, True)
  try:
    train.train(make_config(folder, '3-4'), epath.Path(folder / 'run'))
  finally:
    jax.config.update(in_key, False)
  [trace] = (folder / 'run' / 'profile').rglob('*.xplane.pb')
  # Where TensorBoard's plugin looks.
  assert trace.parents[1] == folder / 'run' / 'profile' / 'plugins' / 'profile'
  return trace


@pytest.fixture(scope='module')
def events(trace: pathlib.Path) -> list[tuple[str, dict]]:
  """Name and values of all events of the host and its devices."""
  data = jax.profiler.ProfileData.from_file(str(trace))
  return [
    (event.name, dict(event.stats))
    for plane in data.planes
    for line in plane.lines
    for event in line.events
  ]


def test_trace_has_the_steps_that_were_asked_for(events):
  steps = [values['step_num'] for name, values in events if name == 'train']
  assert steps == [3, 4]


def test_trace_has_all_the_device_work_of_its_steps(events):
  operations = collections.Counter(
    (values['run_id'], values['device_ordinal'])
    for _, values in events
    if values.get('hlo_module') == 'jit_train_step'
  )
  # Two runs of the program, and nothing of the step before.
  first, last = (
    sorted(n for (run, _), n in operations.items() if run == one)
    for one in sorted({run for run, _ in operations})
  )
  assert len(first) == jax.device_count() and min(first) > 100
  assert first == last


def test_trace_names_the_phases_of_the_host(events):
  names = {name for name, _ in events}
  assert {'build_batch', 'place_batch'} <= names


@pytest.mark.parametrize(
  'name',
  [
    'embed', 'layers', 'attention', 'mlp', 'pool', 'contrastive_loss',
    'next_token_loss', 'optimizer',
  ],
)  # fmt: skip
def test_trace_names_the_parts_of_the_step(trace, name):
  scope = rf'jit\(train_step\)/[ -~]*?[/(]{name}[/)]'
  assert re.search(scope.encode(), trace.read_bytes())


def test_a_tpu_library_without_a_tpu_is_named_and_not_started(
  tmp_path, monkeypatch
):
  pytest.importorskip('libtpu')
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  config = write_config(make_config(tmp_path, '3-4'), tmp_path / 'config.py')
  process = start(config, tmp_path / 'run')
  output = process.communicate(timeout=120)[0]
  assert process.returncode == 2, output
  assert "error: profile.steps='3-4': libtpu is installed" in output
  assert 'Traceback' not in output
  assert not (tmp_path / 'run').exists()
