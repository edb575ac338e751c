"""Whole runs of the training command, on small files of the true formats."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath
from small_run import (
  ROOT,
  STEPS,
  copy_until,
  make_config,
  read_metrics,
  run_here,
  start,
  wait_for_step,
)

from grit_jax import cli, train
from grit_jax import config as configuration
from grit_jax.config import (
  CheckpointConfig,
  Config,
  EvaluationConfig,
  MemoryConfig,
  MeshConfig,
  OptimizerConfig,
)
from grit_jax.data.formats import FormatError
from grit_jax.data.records import RecordError
from grit_jax.errors import ConfigError, UserError
from grit_jax.models import presets

# Metrics of one run on two meshes: float32 sums in another order, carried
# through an optimizer step or two, which divides by the gradient's size.
MESH_TOLERANCE = 1e-3


@pytest.fixture(scope='module')
def folder(trained) -> pathlib.Path:
  """JSON-lines files of both kinds."""
  return pathlib.Path(trained.config.data.paths)


def test_run_leaves_what_the_readme_says(trained):
  metrics = read_metrics(trained.workdir)
  assert [line['step'] for line in metrics] == list(range(1, STEPS + 1))
  assert {
    'loss', 'loss_rep', 'loss_gen', 'grad_norm', 'learning_rate',
    'padding_fraction', 'masked_negatives',
  } <= set(metrics[0])  # fmt: skip
  kept = json.loads((trained.workdir / 'config.json').read_text())
  assert kept['steps'] == STEPS
  evaluation = json.loads((trained.workdir / 'evaluation.json').read_text())
  assert list(evaluation) == ['before', 'after', 'random', 'tfidf']
  for row in 'before', 'after':
    assert set(evaluation[row]) == {
      'recall_at_1', 'recall_at_10', 'ndcg_at_10', 'candidates',
      'generative_loss',
    }  # fmt: skip
  assert (trained.workdir / 'loss.png').read_bytes().startswith(b'\x89PNG')
  assert list(trained.workdir.glob('**/events.out.tfevents.*'))
  assert (trained.workdir / 'checkpoints' / str(STEPS)).is_dir()
  assert not (trained.workdir / 'profile').exists()
  assert 'recall_at_10' in trained.output and 'generated:' in trained.output
  assert 'the kernel xla on cpu (attention_kernel=auto)' in trained.output


def test_loss_falls(trained):
  metrics = read_metrics(trained.workdir)
  assert metrics[-1]['loss_gen'] < metrics[0]['loss_gen'] - 0.2


@pytest.mark.e2e
def test_run_that_a_sigterm_and_a_sigkill_end_goes_on_with_equal_metrics(
  trained, tmp_path
):
  process = start(
    trained.config_file, tmp_path, '--config.checkpoint.every_steps=50'
  )
  wait_for_step(tmp_path, 1, process)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate()
  assert process.returncode == 128 + signal.SIGTERM, output
  [saved] = (path.name for path in (tmp_path / 'checkpoints').iterdir())
  assert 0 < int(saved) <= STEPS, output

  process = start(trained.config_file, tmp_path)
  wait_for_step(tmp_path, min(int(saved) + 1, STEPS), process)
  process.send_signal(signal.SIGKILL)
  process.communicate()

  process = start(trained.config_file, tmp_path)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  assert f'Going on from {tmp_path}/checkpoints/' in output
  assert read_metrics(tmp_path) == read_metrics(trained.workdir)
  for run in 'after', 'tfidf':
    found, expected = (
      json.loads((place / 'evaluation.json').read_text())[run]
      for place in (tmp_path, trained.workdir)
    )
    assert found == expected


@pytest.mark.e2e
def test_evaluations_are_among_the_metrics_and_change_nothing_of_training(
  trained, tmp_path, monkeypatch
):
  config = edit(trained.config, 'evaluation', every_steps=4)
  workdir, saved = tmp_path / 'run', {}
  save = train.Checkpoints.save

  def look_and_save(self, step: int, *arguments, **keywords) -> None:
    saved[step] = read_metrics(workdir)
    save(self, step, *arguments, **keywords)

  with monkeypatch.context() as patch:
    patch.setattr(train.Checkpoints, 'save', look_and_save)
    evaluation = run_here(config, workdir)
  metrics = read_metrics(workdir)
  steps = [line['step'] for line in metrics]
  assert steps == [0, 1, 2, 3, 4, 4, 5, 6, 6]
  found = {
    line['step']: {
      name.removeprefix('evaluation/'): value
      for name, value in line.items()
      if name != 'step'
    }
    for line in metrics
    if 'loss' not in line
  }
  assert list(found) == [0, 4, STEPS]
  assert found[0] == evaluation['before'] and found[6] == evaluation['after']
  losses = [found[step]['generative_loss'] for step in found]
  assert losses[0] > losses[1] > losses[2]
  # A checkpoint's step is evaluated before it is saved, or a run that goes on
  # from there would lack its figures.
  assert list(saved) == [2, 4, 6]
  assert all(saved[step] == metrics[: len(saved[step])] for step in saved)
  assert [len(saved[step]) for step in saved] == [3, 6, 9]

  run_here(config, copy_until(2, workdir, tmp_path / 'resumed'))
  assert read_metrics(tmp_path / 'resumed') == metrics
  # Nor does a run that has ended write any line twice.
  run_here(config, workdir)
  assert read_metrics(workdir) == metrics

  config = edit(trained.config, 'evaluation', enabled=False)
  run_here(config, tmp_path / 'without')
  without = read_metrics(tmp_path / 'without')
  assert without == [line for line in metrics if 'loss' in line]


def test_mistake_ends_in_one_message_and_not_in_a_traceback(
  trained, tmp_path, capsys
):
  flags = [
    f'--config={trained.config_file}', f'--workdir={tmp_path / "run"}',
    '--config.model.num_heads=3',
  ]  # fmt: skip
  with pytest.raises(SystemExit) as end:
    cli.run(train.make_parser(), train.start, flags, config=True)
  assert end.value.code == 2
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith('grit_jax: error: model.num_heads=3 is not a multiple')


@pytest.mark.e2e
def test_resume_on_another_mesh_goes_on(trained, tmp_path):
  config = dataclasses.replace(
    # Rows are padded to the shards: as many on one device as on four.
    edit(trained.config, 'evaluation', enabled=False),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
  )
  run = copy_until(2, trained.workdir, tmp_path / 'run')
  run_here(config, run, devices=8)
  found, expected = read_metrics(run), read_metrics(trained.workdir)
  for one, other in zip(found, expected, strict=True):
    for name in 'loss_rep', 'loss_gen':
      np.testing.assert_allclose(one[name], other[name], rtol=MESH_TOLERANCE)


def test_non_finite_loss_names_step_records_and_checkpoint(folder, tmp_path):
  config = dataclasses.replace(
    edit(make_config(folder), 'model', num_layers=1),
    optimizer=OptimizerConfig(
      learning_rate=1e30, warmup_fraction=0.0, schedule='constant'
    ),
    evaluation=EvaluationConfig(enabled=False, held_out_fraction=0.3, rows=8),
    checkpoint=CheckpointConfig(every_steps=1),
  )
  with pytest.raises(UserError) as error:
    run_here(config, tmp_path / 'run')
  message = str(error.value)
  assert message.startswith('step 2: loss=')
  assert str(tmp_path / 'run' / 'checkpoints' / '1') in message
  assert message.count('pairs.jsonl:') == 8
  assert message.count('chats.jsonl:') == 8
  saved = {path.name for path in (tmp_path / 'run/checkpoints').iterdir()}
  assert saved == {'1'}


def test_corrupt_checkpoint_is_named_and_kept(trained, tmp_path):
  copy = tmp_path / 'run'
  shutil.copytree(trained.workdir, copy)
  arrays = copy / 'checkpoints' / str(STEPS) / 'state'
  files = sorted(p for p in arrays.rglob('*') if p.is_file())
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:10])
  with pytest.raises(UserError, match=f'checkpoints/{STEPS}'):
    run_here(trained.config, copy)
  assert arrays.is_dir()


@pytest.mark.e2e
def test_run_starts_where_another_has_ended_and_resumes_without_it(
  trained, tmp_path
):
  source, workdir = tmp_path / 'source', tmp_path / 'run'
  shutil.copytree(trained.workdir / 'checkpoints' / str(STEPS), source)
  model = dataclasses.replace(presets.of_init_from(), dtype='float32')
  config = dataclasses.replace(
    trained.config, model=model, init_from=str(source)
  )
  before = run_here(config, workdir)['before']
  after = json.loads((trained.workdir / 'evaluation.json').read_text())['after']
  assert before.keys() == after.keys()
  for name, value in after.items():
    np.testing.assert_allclose(before[name], value, rtol=MESH_TOLERANCE)
  kept = json.loads((workdir / 'config.json').read_text())['model']
  assert kept['embed_dim'] == trained.config.model.embed_dim
  # It does not train a tokenizer of its own.
  assert not (workdir / 'tokenizer.model').exists()

  expected = read_metrics(workdir)
  shutil.rmtree(source)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  run_here(config, workdir)
  assert read_metrics(workdir) == expected
  shutil.rmtree(workdir / 'checkpoints')
  with pytest.raises(UserError, match='source is neither'):
    run_here(config, workdir)


def test_another_config_in_the_workdir_is_refused(trained):
  # What may change is not named.
  config = dataclasses.replace(
    trained.config, seed=1, log_every=2, attention_kernel='splash'
  )
  with pytest.raises(ConfigError, match=r'configuration \(seed: 0, now 1\)'):
    run_here(config, trained.workdir)
  config = edit(trained.config, 'evaluation', held_out_fraction=0.2)
  with pytest.raises(ConfigError, match='held_out_fraction: 0.3, now 0.2'):
    run_here(config, trained.workdir)


def run(config: Config, workdir: pathlib.Path) -> None:
  """Trains on all of the eight devices."""
  train.train(config, epath.Path(workdir))


def edit(config: Config, group: str, **changes) -> Config:
  value = dataclasses.replace(getattr(config, group), **changes)
  return dataclasses.replace(config, **{group: value})


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"query": ["a", "b"], "pos": [["", "c"]]', r'bad\.jsonl:2'),
    ('', r'bad\.jsonl:2'),
    ('{"query": ["a", "b"], "neg": [["", "c"]]}', r'bad\.jsonl:2.*pos'),
  ],
)
def test_bad_record_names_file_and_line(tmp_path, line, message):
  good = '{"query": ["a", "b"], "pos": [["", "c"]], "neg": [["", "d"]]}'
  (tmp_path / 'bad.jsonl').write_text(f'{good}\n{line}\n{good}\n')
  config = edit(make_config(tmp_path), 'objective', mode='embedding')
  config = edit(config, 'evaluation', enabled=False, held_out_fraction=0.0)
  with pytest.raises(RecordError, match=message):
    run(config, tmp_path / 'run')


def test_instruction_longer_than_its_limit_names_file_and_line(
  folder, tmp_path
):
  record = {
    'query': ['a ' * 60, 'b'], 'pos': [['', 'c']], 'neg': [['', 'd']],
  }  # fmt: skip
  pairs = (folder / 'pairs.jsonl').read_text().splitlines()
  pairs[4] = json.dumps(record)
  (tmp_path / 'pairs.jsonl').write_text('\n'.join(pairs) + '\n')
  config = edit(make_config(tmp_path), 'objective', mode='embedding')
  config = edit(config, 'evaluation', enabled=False, held_out_fraction=0.0)
  with pytest.raises((FormatError, RecordError), match=r'pairs\.jsonl:5'):
    run(config, tmp_path / 'run')


@pytest.mark.parametrize(
  ('group', 'changes', 'error', 'message'),
  [
    ('mesh', {'data': 3}, UserError, '8 devices do not divide by 3'),
    ('mesh', {'fsdp': 3}, UserError, 'mesh of 3 devices, but there are 8'),
    ('mesh', {'tensor': 4}, UserError, 'model.num_kv_heads=2'),
    ('memory', {'chunk_rows': 6}, UserError, 'memory.chunk_rows=6'),
    ('data', {'embedding_batch': 900}, ConfigError, 'data.embedding_batch'),
    ('data', {'paths': 'nowhere'}, FileNotFoundError, 'nowhere'),
    ('data', {'tokenizer': 'nowhere.model'}, FileNotFoundError, 'nowhere'),
    ('model', {'vocab_size': 20}, ConfigError, 'model.vocab_size=20'),
    ('model', {'vocab_size': 10**9}, UserError, '96,000,.* GiB a device, of'),
    ('model', {'num_layers': 10**9}, UserError, ' weights .* GiB a device, of'),
  ],
)
def test_what_does_not_fit_is_named_before_training(
  folder, tmp_path, group, changes, error, message
):
  with pytest.raises(error, match=message):
    run(edit(make_config(folder), group, **changes), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_mode_without_its_data_is_named(folder, tmp_path):
  (tmp_path / 'pairs.jsonl').write_text((folder / 'pairs.jsonl').read_text())
  with pytest.raises(ConfigError, match='needs generative records'):
    run(make_config(tmp_path), tmp_path / 'run')


@pytest.mark.e2e
@pytest.mark.parametrize('mode', ['embedding', 'generative'])
def test_single_modes_run_with_their_own_data_alone(folder, tmp_path, mode):
  name = {'embedding': 'pairs', 'generative': 'chats'}[mode] + '.jsonl'
  (tmp_path / name).write_text((folder / name).read_text())
  config = edit(make_config(tmp_path), 'objective', mode=mode)
  config = edit(config, 'memory', chunk_rows=8)
  config = dataclasses.replace(config, steps=2)
  result = run_here(config, tmp_path / 'run')
  metrics = read_metrics(tmp_path / 'run')[-1]
  assert ('loss_rep' in metrics) == (mode == 'embedding')
  assert ('loss_gen' in metrics) == (mode == 'generative')
  assert ('recall_at_10' in result['after']) == (mode == 'embedding')
  assert ('generative_loss' in result['after']) == (mode == 'generative')


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')))
def test_shipped_config_is_valid(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config()
  # What only a user can name.
  values.data.paths = values.data.paths or 'folder'
  if not values.model.embed_dim:
    values.init_from = 'folder'
  config = configuration.resolve(values)
  assert config.steps > 0 and module.__doc__


def test_memory_settings_are_the_only_two():
  assert [f.name for f in dataclasses.fields(MemoryConfig)] == [
    'remat',
    'chunk_rows',
  ]
  assert jax.device_count() == 8
