"""Tests of what is said to sentence-transformers; tools_test.py runs it."""

import dataclasses

import pytest

from grit_jax.config import ATTENTION_MODES, POOLINGS, Config, ObjectiveConfig
from grit_jax.convert.sentence_transformers import (
  describe_modules,
  describe_projection,
  find_obstacle,
)
from grit_jax.models import presets


def make_config(mode: str = 'unified', **model) -> Config:
  return Config(
    model=dataclasses.replace(presets.tiny(), **model),
    objective=ObjectiveConfig(mode=mode),
  )


@pytest.mark.parametrize('pooling', POOLINGS)
@pytest.mark.parametrize('attention', ATTENTION_MODES)
def test_only_what_can_be_said_exactly_is_said(attention, pooling):
  obstacle = find_obstacle(make_config(attention=attention, pooling=pooling))
  exact = attention in ('bbcc', 'bbbc', 'cccc') and pooling != 'weightedmean'
  assert bool(obstacle) != exact
  if not exact:
    assert f'`{attention}`' in obstacle or f'`{pooling}`' in obstacle


def test_a_model_that_generates_alone_has_no_embeddings():
  assert 'to generate alone' in find_obstacle(make_config('generative'))
  assert not find_obstacle(make_config('embedding'))


def test_modules_are_in_the_order_of_the_computation():
  files = describe_modules(presets.tiny())
  assert [
    (module['type'].rpartition('.')[2], module['path'])
    for module in files['modules.json']
  ] == [
    ('Transformer', ''),
    ('Pooling', '1_Pooling'),
    ('Normalize', '2_Normalize'),
  ]
  model = dataclasses.replace(presets.tiny(), projection_dim=7)
  files = describe_modules(model) | describe_projection(model)
  assert [module['path'] for module in files['modules.json']] == [
    '', '1_Pooling', '2_Dense', '3_Normalize'
  ]  # fmt: skip
  assert [module['idx'] for module in files['modules.json']] == [0, 1, 2, 3]
  assert files['2_Dense/config.json'] == {
    'in_features': 32,
    'out_features': 7,
    'bias': True,
    'activation_function': 'torch.nn.modules.linear.Identity',
  }


@pytest.mark.parametrize(
  'pooling, key, include_prompt',
  [
    ('mean', 'pooling_mode_mean_tokens', False),
    ('cls', 'pooling_mode_cls_token', True),
    ('lasttoken', 'pooling_mode_lasttoken', True),
  ],
)
def test_one_pooling_is_on(pooling, key, include_prompt):
  model = dataclasses.replace(presets.tiny(), pooling=pooling)
  described = describe_modules(model)['1_Pooling/config.json']
  assert [name for name, value in described.items() if value is True] == [
    key, *(['include_prompt'] if include_prompt else [])
  ]  # fmt: skip
  assert described['word_embedding_dimension'] == 32


@pytest.mark.parametrize(
  'attention, causal', [('bbcc', False), ('bbbc', False), ('cccc', True)]
)
def test_attention_is_that_of_the_embedding_stream(attention, causal):
  model = dataclasses.replace(presets.tiny(), attention=attention)
  files = describe_modules(model)
  settings = files['sentence_bert_config.json']
  assert settings['config_args'] == {'is_causal': causal}
  # Versions that would attend causally without a word are refused.
  prompts = files['config_sentence_transformers.json']
  assert ('requirements' in prompts) != causal
  assert prompts['prompts'][prompts['default_prompt_name']] == '<|embed|>\n'


def test_texts_are_cut_where_the_positions_end():
  for positions, tokens in (32768, 512), (64, 64):
    model = dataclasses.replace(presets.tiny(), max_positions=positions)
    settings = describe_modules(model)['sentence_bert_config.json']
    assert settings['max_seq_length'] == tokens


def test_missing_requirements_stop_the_library(tmp_path):
  environment = pytest.importorskip('sentence_transformers.util.environment')
  files = describe_modules(presets.tiny())
  requirements = files['config_sentence_transformers.json']['requirements']
  environment.check_version_requirements(requirements)
  requirements['transformers']['specifier'] = '>=999'
  with pytest.raises(ImportError, match='no bidirectional attention'):
    environment.check_version_requirements(requirements)
