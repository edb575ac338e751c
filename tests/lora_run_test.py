"""Whole runs that train adapters, on a base that a run has left."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
import pytest
from small_run import make_config, read_metrics, write_records

from grit_jax import train
from grit_jax.batch import Rows
from grit_jax.checkpoint import CheckpointError, find_checkpoint, flatten
from grit_jax.config import Config, ConfigError, LoraConfig, MeshConfig
from grit_jax.initial import load_model, load_unmerged, open_initial
from grit_jax.models.attention import Kind
from grit_jax.models.quantization import quantize
from grit_jax.sharding import place

# A merged weight is one product of float32 numbers away from its factors.
MERGED_TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> tuple[Config, pathlib.Path]:
  """The config and the workdir of a short run that trains all weights."""
  root = tmp_path_factory.mktemp('base')
  write_records(root)
  config = make_config(root)
  # Sizes that divide over eight devices, halved for two to a byte.
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, embed_dim=48, head_dim=32, mlp_dim=128
    ),
    data=dataclasses.replace(config.data, cache_dir=str(root / 'cache')),
    mesh=MeshConfig(fsdp=4, tensor=2),
    evaluation=dataclasses.replace(config.evaluation, enabled=False),
    steps=2,
  )
  train.train(config, root / 'run')
  return config, root / 'run'


def adapt(run: tuple, **changes: object) -> Config:
  config, workdir = run
  lora = LoraConfig(rank=4, dropout=0.1, base='nf4')
  return dataclasses.replace(
    config,
    init_from=str(workdir),
    lora=dataclasses.replace(lora, **changes),
    steps=4,
  )


@pytest.fixture(scope='module')
def adapted(base, tmp_path_factory) -> tuple[Config, pathlib.Path]:
  """The config and the workdir of a run of adapters on nf4."""
  workdir = tmp_path_factory.mktemp('adapted')
  config = adapt(base)
  evaluation = dataclasses.replace(config.evaluation, enabled=True)
  train.train(dataclasses.replace(config, evaluation=evaluation), workdir)
  return config, workdir


def test_a_run_leaves_adapters_alone_and_names_its_base(base, adapted):
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
  assert named['init_from'] == str(find_checkpoint(base[1]).folder)
  evaluation = json.loads((workdir / 'evaluation.json').read_text())
  before, after = evaluation['before'], evaluation['after']
  assert after['generative_loss'] < before['generative_loss']


def test_a_resumed_run_has_equal_metrics_wherever_its_base_is(
  base, adapted, tmp_path
):
  config, workdir = adapted
  shutil.copytree(base[1], tmp_path / 'moved')
  config = dataclasses.replace(config, init_from=str(tmp_path / 'moved'))
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / 'checkpoints' / '4')
  train.train(config, copy)
  assert read_metrics(copy) == read_metrics(workdir)


def test_another_base_is_refused(base, adapted, tmp_path):
  config, workdir = adapted
  other = tmp_path / 'other'
  train.train(dataclasses.replace(base[0], steps=1), other)
  config = dataclasses.replace(config, init_from=str(other))
  with pytest.raises(CheckpointError, match='has other weights than that had'):
    train.train(config, workdir)


def test_the_merged_model_is_the_unmerged_one(base, mesh_of, tmp_path):
  config = adapt(base, base='float32')
  train.train(dataclasses.replace(config, steps=2), tmp_path)
  initial = open_initial(tmp_path)
  with jax.set_mesh(mesh_of(1, 4, 2)):
    unmerged = load_unmerged(initial)
    merged = load_model(initial.config, initial, jax.random.key(0))
    plain = load_model(initial.config, initial.base, jax.random.key(0))
    states = [hidden_states(model) for model in (unmerged, merged, plain)]
  np.testing.assert_allclose(
    states[1], states[0], atol=MERGED_TOLERANCE * np.abs(states[0]).max()
  )
  assert np.abs(states[2] - states[0]).max() > 1e-3 * np.abs(states[0]).max()


def hidden_states(model) -> np.ndarray:
  mesh = jax.sharding.get_mesh()
  tokens = np.random.default_rng(0).integers(300, size=(8, 16)).astype(np.int32)
  positions = np.tile(np.arange(16, dtype=np.int32), (8, 1))
  rows = Rows(tokens, np.ones_like(tokens), positions, tokens < 0)
  rows = jax.tree.map(lambda x: place(mesh, x, 'rows', 'seq'), rows)
  return np.asarray(jax.jit(lambda m: m([rows], [Kind.CAUSAL])[0])(model))


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


def test_adapters_without_a_base_are_refused(base, tmp_path):
  config = dataclasses.replace(adapt(base), init_from='')
  with pytest.raises(ConfigError, match='adapters need a base'):
    train.train(config, tmp_path)


def test_a_projection_that_would_not_be_trained_is_refused(base, tmp_path):
  config = adapt(base)
  model = dataclasses.replace(config.model, projection_dim=8)
  config = dataclasses.replace(config, model=model)
  with pytest.raises(ConfigError, match='a new one would not be trained'):
    train.train(config, tmp_path)
