"""Tests of the configurations in configs/: each is one that a run can have."""

import dataclasses
import importlib.util
import pathlib

import jax
import pytest

from grit_jax import config as configuration
from grit_jax import sharding
from grit_jax.config import Config
from grit_jax.models import presets

FOLDER = pathlib.Path(__file__).parents[1] / 'configs'
CONFIGS = sorted(path.stem for path in FOLDER.glob('*.py'))


def load(name: str) -> Config:
  """The configuration that a run would have with its flags alone."""
  spec = importlib.util.spec_from_file_location(name, FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config()
  values.data.paths = values.data.paths or 'pairs.jsonl'
  if not values.model.embed_dim:
    values.init_from = 'folder'
  return configuration.resolve(values)


@pytest.mark.parametrize('name', CONFIGS)
def test_each_is_valid_and_divides_over_a_host_of_devices(name: str):
  config = load(name)
  if not config.model.embed_dim:
    # What Mistral's folder would bring.
    config = dataclasses.replace(config, model=presets.mistral_7b())
  model = config.model
  if not model.vocab_size:
    # What the tokenizer would bring.
    model = dataclasses.replace(model, vocab_size=config.data.tokenizer_pieces)
  config = dataclasses.replace(config, model=model)
  config.validate()
  sharding.validate(config, sharding.make_mesh(config.mesh, jax.devices()))


@pytest.mark.parametrize('name', CONFIGS)
def test_each_says_how_it_is_run(name: str):
  text = (FOLDER / f'{name}.py').read_text()
  assert f'--config=configs/{name}.py' in text


def test_the_quickstart_with_experts_is_the_quickstart_but_for_them():
  plain, experts = load('quickstart'), load('quickstart_moe')
  assert experts.model.num_experts == 8
  assert experts.objective.generative_router_weight > 0
  model = dataclasses.replace(
    experts.model, num_experts=0, mlp_dim=plain.model.mlp_dim
  )
  assert dataclasses.replace(experts, model=model) == plain


def test_gritlm_8x7b_is_mixtral_with_the_papers_batch():
  config = load('gritlm_8x7b')
  assert config.model == presets.mixtral_8x7b()
  data = config.data
  assert (data.embedding_batch, data.generative_batch) == (256, 256)
  assert (data.num_passages, config.steps) == (2, 1253)
  assert (config.model.attention, config.model.pooling) == ('bbcc', 'mean')
  assert config.optimizer.learning_rate == 2e-5
  assert config.objective.temperature == 0.02
