"""Tests of the recipes in `configs/` against the paper's settings."""

import importlib.util
import pathlib

import pytest

from grit_jax import config as configuration
from grit_jax.config import Config

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def load(name: str, *variant: str) -> Config:
  path = CONFIGS / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config(*variant)
  values.data.paths = 'unused'
  return configuration.resolve(values)


@pytest.mark.parametrize(
  ('name', 'mode', 'pairs', 'reduction'),
  [
    ('gritlm_7b', 'unified', 2048, 'mixed'),
    ('embedding_only_7b', 'embedding', 2048, 'mixed'),
    ('generative_only_7b', 'generative', 2048, 'mixed'),
    ('gritlm_8x7b', 'unified', 256, 'token'),
  ],
)
def test_a_recipe_has_the_settings_of_the_paper(
  name: str, mode: str, pairs: int, reduction: str
):
  config = load(name)
  objective, data, optimizer = config.objective, config.data, config.optimizer
  assert objective.mode == mode
  assert (data.embedding_batch, data.generative_batch) == (pairs, 256)
  assert objective.generative_reduction == reduction
  assert objective.mixed_groups == 8
  assert objective.temperature == 0.02
  assert objective.embedding_weight == objective.generative_weight == 1
  assert (config.model.attention, config.model.pooling) == ('bbcc', 'mean')
  assert (data.max_query_tokens, data.max_passage_tokens) == (256, 2048)
  assert (data.max_generative_tokens, data.num_passages) == (2048, 2)
  assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999)
  assert (optimizer.learning_rate, optimizer.weight_decay) == (2e-5, 0)
  assert (optimizer.schedule, optimizer.warmup_fraction) == ('linear', 0.03)
  assert (optimizer.clip_norm, config.steps) == (1, 1253)


@pytest.mark.parametrize(
  ('name', 'devices'), [('gritlm_7b', 8), ('gritlm_8x7b', 256)]
)
def test_a_variant_has_the_references_embedding_weight(name: str, devices: int):
  assert (
    load(name, 'reference_weight').objective.embedding_weight * devices == 1
  )
  assert not load(name, 'reference_weight').data.mask_known_positives
  assert load(name).data.mask_known_positives
  with pytest.raises(ValueError, match="'refrence' is no variant"):
    load(name, 'refrence')
