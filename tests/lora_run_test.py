"""Whole runs that train adapters, on a base that a run has left."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
import pytest
from small_run import Trained, copy_until, read_metrics, run_here

from grit_jax.checkpoint import find_checkpoint, flatten
from grit_jax.config import CheckpointConfig, Config, LoraConfig, MeshConfig
from grit_jax.errors import ConfigError, UserError
from grit_jax.initial import load_model, load_unmerged, open_initial
from grit_jax.models.quantization import quantize

pytestmark = pytest.mark.e2e

LORA = LoraConfig(rank=4, dropout=0.1, base='nf4')


def adapt(trained: Trained) -> Config:
  """The config of a short run of adapters, on four devices."""
  return dataclasses.replace(
    trained.config,
    init_from=str(trained.workdir),
    lora=LORA,
    mesh=MeshConfig(fsdp=2, tensor=2),
    checkpoint=CheckpointConfig(every_steps=2),
    evaluation=dataclasses.replace(trained.config.evaluation, enabled=False),
    steps=4,
  )


@pytest.fixture(scope='module')
def adapted(trained, tmp_path_factory) -> tuple[Config, pathlib.Path]:
  """The config and the workdir of a run of adapters on nf4."""
  workdir = tmp_path_factory.mktemp('adapted')
  config = adapt(trained)
  evaluation = dataclasses.replace(config.evaluation, enabled=True)
  run_here(dataclasses.replace(config, evaluation=evaluation), workdir, 4)
  return config, workdir


def test_a_run_leaves_adapters_alone_and_names_its_base(trained, adapted):
  _, workdir = adapted
  checkpoint = find_checkpoint(workdir)
  types = checkpoint.types()
  model = [path for path in types if path.startswith('model/')]
  assert len(model) == 14
  assert all('/adapters/' in path for path in model)
  moments = [path for path in types if path.startswith('optimizer/')]
  assert sum('/blocks/' in path for path in moments) == 28
  assert all('/adapters/' in path for path in moments if 'blocks' in path)
  named = checkpoint.read_base()
  assert named['init_from'] == str(find_checkpoint(trained.workdir).folder)
  evaluation = json.loads((workdir / 'evaluation.json').read_text())
  before, after = evaluation['before'], evaluation['after']
  assert after['generative_loss'] < before['generative_loss']


def test_a_resumed_run_has_equal_metrics_wherever_its_base_is(
  trained, adapted, tmp_path
):
  config, workdir = adapted
  shutil.copytree(trained.workdir, tmp_path / 'moved')
  config = dataclasses.replace(config, init_from=str(tmp_path / 'moved'))
  copy = copy_until(2, workdir, tmp_path / 'run')
  run_here(config, copy, 4)
  assert read_metrics(copy) == read_metrics(workdir)


def test_another_base_is_refused(trained, adapted):
  config, workdir = adapted
  # Of earlier steps: other weights of one architecture.
  other = trained.workdir / 'checkpoints' / '2'
  config = dataclasses.replace(config, init_from=str(other))
  with pytest.raises(UserError, match='has other weights, .* than that had'):
    run_here(config, workdir, 4)


def test_an_unmerged_model_has_the_base_that_it_was_trained_on(
  adapted, mesh_of: Callable
):
  _, workdir = adapted
  initial = open_initial(workdir)
  with jax.set_mesh(mesh_of(1, 4, 2)):
    model = flatten(load_unmerged(initial))
    config = dataclasses.replace(
      initial.config,
      model=dataclasses.replace(initial.model, param_dtype='bfloat16'),
    )
    plain = load_model(config, initial.base, jax.random.key(0))
    frozen = flatten(quantize(plain, 'nf4'))
  for path, array in frozen.items():
    np.testing.assert_array_equal(model.pop(path), array)
  for path, array in model.items():
    saved = initial.adapters.open_array(f'model/{path}').read().result()
    np.testing.assert_array_equal(array, saved)


def test_adapters_without_a_base_are_refused(trained, tmp_path):
  config = dataclasses.replace(adapt(trained), init_from='')
  with pytest.raises(ConfigError, match='adapters need a base'):
    run_here(config, tmp_path, 4)


def test_a_projection_that_would_not_be_trained_is_refused(trained, tmp_path):
  config = adapt(trained)
  model = dataclasses.replace(config.model, projection_dim=8)
  config = dataclasses.replace(config, model=model)
  with pytest.raises(ConfigError, match='a new one would not be trained'):
    run_here(config, tmp_path, 4)
