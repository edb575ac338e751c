"""A run that goes on is the run that it was, by content and not by paths."""

import dataclasses
import json
import logging as standard
import pathlib
import shutil

import pytest
from small_run import STEPS, copy_until, read_metrics, run_here

from grit_jax import files
from grit_jax.checkpoint import Checkpoints
from grit_jax.config import Config
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.errors import ConfigError, UserError
from grit_jax.files import LockedError
from grit_jax.models import presets


@pytest.fixture
def config(trained) -> Config:
  """That of the small run, which may evaluate or not."""
  evaluation = dataclasses.replace(trained.config.evaluation, enabled=False)
  return dataclasses.replace(trained.config, evaluation=evaluation)


@pytest.fixture
def records(trained, tmp_path) -> pathlib.Path:
  """A copy of the small run's data."""
  return shutil.copytree(trained.config.data.paths, tmp_path / 'records')


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
  """A copy of the small run as it was after step 2."""
  return copy_until(2, trained.workdir, tmp_path / 'run')


def edit(config: Config, **changes) -> Config:
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, **changes)
  )


def losses(workdir: pathlib.Path) -> list[float]:
  return [line['loss'] for line in read_metrics(workdir) if 'loss' in line]


def test_data_that_has_moved_is_the_same(trained, config, records, workdir):
  run_here(edit(config, paths=str(records)), workdir)
  # Of two programs, one compiled for eight devices; the batches are the same.
  assert losses(workdir) == pytest.approx(losses(trained.workdir), rel=1e-5)


@pytest.mark.parametrize('name', ['pairs.jsonl', 'chats.jsonl'])
def test_data_that_was_edited_is_refused(config, records, workdir, name):
  lines = (records / name).read_text().splitlines()
  (records / name).write_text('\n'.join(lines[1:]) + '\n')
  config = edit(config, paths=str(records))
  # The model's tokenizer, which else would be trained on the new data.
  message = f'checkpoints/2 is of a run with another content of {name[:5]}'
  with pytest.raises(ConfigError, match=message):
    run_here(config, workdir)
  with pytest.raises(ConfigError, match='data.allow_changed=True'):
    run_here(config, workdir)


def test_data_that_may_change_goes_on_at_the_same_step(
  trained, config, records, workdir, caplog
):
  lines = (records / 'pairs.jsonl').read_text().splitlines()
  (records / 'pairs.jsonl').write_text('\n'.join(lines[:-20]) + '\n')
  changed = edit(config, paths=str(records), allow_changed=True)
  with caplog.at_level(standard.WARNING):
    run_here(changed, workdir)
  assert 'planned from the data as it is now' in caplog.text
  steps = [line['step'] for line in read_metrics(workdir)]
  assert steps == list(range(1, STEPS + 1))
  before, after = losses(trained.workdir), losses(workdir)
  assert after[:2] == before[:2] and after[2:] != before[2:]
  # From then on, that is the run's data.
  run_here(edit(config, paths=str(records)), workdir)
  with pytest.raises(ConfigError, match='another content of pairs'):
    run_here(config, workdir)


def test_another_tokenizer_is_refused_whatever_may_change(
  trained, config, workdir, tmp_path
):
  text = (pathlib.Path(trained.config.data.paths) / 'chats.jsonl').read_text()
  model = train_tokenizer(iter(text.splitlines()[:30] * 9), 300)
  # At the path of the run's own.
  (workdir / 'tokenizer.model').write_bytes(model)
  for changed in config, edit(config, allow_changed=True):
    with pytest.raises(ConfigError, match='run with another tokenizer'):
      run_here(changed, workdir)


def test_the_model_that_a_run_began_with_may_move_and_not_be_another(
  trained, config, tmp_path
):
  base, workdir = tmp_path / 'base', tmp_path / 'begun'
  shutil.copytree(trained.workdir / 'checkpoints' / str(STEPS), base)
  model = dataclasses.replace(presets.of_init_from(), dtype='float32')
  config = dataclasses.replace(
    config, model=model, init_from=str(base), steps=2
  )
  run_here(config, workdir)
  expected = read_metrics(workdir)
  base = base.rename(tmp_path / 'moved')
  run_here(dataclasses.replace(config, init_from=str(base)), workdir)
  assert read_metrics(workdir) == expected
  other = trained.workdir / 'checkpoints/2'
  with pytest.raises(ConfigError, match=f'{other}.*began with another model'):
    run_here(dataclasses.replace(config, init_from=str(other)), workdir)


def test_a_second_run_of_a_workdir_is_refused(config, workdir):
  before = sorted(workdir.rglob('*'))
  with files.lock(workdir / '.lock'):
    with pytest.raises(LockedError, match=f'{workdir}: process [0-9]+ on '):
      run_here(config, workdir)
  assert {*workdir.rglob('*')} - {*before} <= {workdir / '.lock'}


def test_the_newest_checkpoint_at_the_end_is_the_runs_own(
  config, workdir, monkeypatch
):
  save = Checkpoints.save

  def save_beside_another(self, step: int, *arguments, **keywords) -> bool:
    is_new = save(self, step, *arguments, **keywords)
    if step == STEPS:
      # What a second run would leave that no lock has kept out.
      self._manager.wait_until_finished()
      folder = self.path(step)
      shutil.copytree(folder, folder.with_name(str(step + 1)))
    return is_new

  monkeypatch.setattr(Checkpoints, 'save', save_beside_another)
  with pytest.raises(UserError, match=f'step {STEPS}, and the newest .* 7'):
    run_here(config, workdir)


def test_a_checkpoint_says_what_the_run_is_made_of(trained):
  [newest] = (trained.workdir / 'checkpoints').glob(f'{STEPS}')
  kept = json.loads((newest / 'fingerprints/fingerprints.json').read_text())
  assert {name for name, _ in kept['run']['data']} == {'pairs', 'chats'}
  assert set(kept['arrays']) > {'model/embed', 'step'}
