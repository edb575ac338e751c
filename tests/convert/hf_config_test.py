"""Tests of config.json, against transformers' own config classes."""

import dataclasses
import json
import re

import pytest

from grit_jax.config import ModelConfig, RotaryScalingConfig
from grit_jax.convert import hf_config
from grit_jax.errors import UserError
from grit_jax.models import presets

LLAMA3 = RotaryScalingConfig('llama3', 8.0, 1.5, 5.0, 4096)
MODELS = {
  'mistral': presets.mistral_7b(),
  'window': dataclasses.replace(presets.tiny(), sliding_window=7),
  'tied': dataclasses.replace(presets.tiny(), tie_embeddings=True),
  'mixtral': presets.mixtral_8x7b(),
  'llama': dataclasses.replace(presets.tiny(), family='llama', rope_theta=5e5),
  'llama3': dataclasses.replace(
    presets.tiny(), family='llama', rotary_scaling=LLAMA3, max_positions=131072
  ),
  'linear': dataclasses.replace(
    presets.tiny(),
    family='llama',
    rotary_scaling=RotaryScalingConfig('linear', 4.0),
  ),
}
SMALL = {
  'model_type': 'llama', 'hidden_size': 32, 'num_attention_heads': 4,
  'num_key_value_heads': 2, 'intermediate_size': 48, 'num_hidden_layers': 2,
}  # fmt: skip


def architecture(model: ModelConfig) -> ModelConfig:
  """What config.json says of a model; a window is left out."""
  return dataclasses.replace(model, sliding_window=0, dtype='bfloat16')


def convert(**changes: object) -> ModelConfig:
  return hf_config.to_model({**SMALL, **changes}, 'folder/config.json')


@pytest.mark.parametrize('name', MODELS)
def test_a_model_is_read_back_from_its_own_config(name: str):
  model = MODELS[name]
  config = json.loads(json.dumps(hf_config.from_model(model, 'float32', 1, 2)))
  assert hf_config.to_model(config, '') == architecture(model)


@pytest.mark.parametrize('name', MODELS)
def test_transformers_reads_what_is_written(name: str, tmp_path):
  transformers = pytest.importorskip('transformers')
  model = MODELS[name]
  written = hf_config.from_model(model, 'bfloat16', bos=5, eos=6)
  (tmp_path / 'config.json').write_text(json.dumps(written))
  config = transformers.AutoConfig.from_pretrained(tmp_path)
  assert config.architectures[0] == {
    'mistral': 'MistralForCausalLM', 'mixtral': 'MixtralForCausalLM',
    'llama': 'LlamaForCausalLM',
  }[config.model_type]  # fmt: skip
  assert config.vocab_size == model.vocab_size
  assert config.hidden_size == model.embed_dim
  assert config.num_hidden_layers == model.num_layers
  assert config.num_attention_heads == model.num_heads
  assert config.num_key_value_heads == model.num_kv_heads
  assert config.head_dim == model.head_dim
  assert config.intermediate_size == model.mlp_dim
  assert config.rms_norm_eps == model.norm_epsilon
  assert config.tie_word_embeddings == model.tie_embeddings
  assert config.max_position_embeddings == model.max_positions
  assert config.is_causal is True
  assert (config.bos_token_id, config.eos_token_id) == (5, 6)
  assert str(config.dtype).endswith('bfloat16')
  assert config.rope_parameters['rope_theta'] == model.rope_theta
  if model.family == 'mistral':
    assert config.sliding_window == (model.sliding_window or None)
  if model.num_experts:
    assert config.num_local_experts == model.num_experts
    assert config.num_experts_per_tok == model.experts_per_token
  scaling = model.rotary_scaling
  kind = 'default' if scaling.kind == 'none' else scaling.kind
  assert config.rope_parameters['rope_type'] == kind
  if kind == 'llama3':
    for key, value in (
      ('factor', scaling.factor),
      ('low_freq_factor', scaling.low_frequency_factor),
      ('high_freq_factor', scaling.high_frequency_factor),
      ('original_max_position_embeddings', scaling.original_positions),
    ):
      assert config.rope_parameters[key] == value


@pytest.mark.parametrize('name', MODELS)
def test_what_transformers_writes_is_read(name: str, tmp_path):
  transformers = pytest.importorskip('transformers')
  model = MODELS[name]
  written = hf_config.from_model(model, 'float32', bos=1, eos=2)
  (tmp_path / 'config.json').write_text(json.dumps(written))
  config = transformers.AutoConfig.from_pretrained(tmp_path)
  config.save_pretrained(tmp_path)
  read = hf_config.read_config(tmp_path)
  assert 'rope_parameters' in read and 'rope_theta' not in read
  assert hf_config.to_model(read, '') == architecture(model)


@pytest.mark.parametrize('family', hf_config.DEFAULTS)
def test_keys_that_are_absent_have_transformers_defaults(family: str):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoConfig.for_model(family).to_dict()
  # transformers 5 gives the rotary positions a group of their own.
  theirs |= theirs['rope_parameters']
  for key, value in hf_config.DEFAULTS[family].items():
    if key == 'num_key_value_heads' and value is None:
      value = theirs['num_attention_heads']
    assert theirs[key] == value, key


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'gpt2'}, "model_type='gpt2' is not one of mistral"),
    ({'model_type': None}, 'model_type=None'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu' cannot be converted"),
    ({'attention_bias': True}, 'attention_bias=True .* no biases'),
    ({'mlp_bias': True}, 'mlp_bias=True'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config='),
    ({'num_experts': 8}, 'num_experts=8'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 2.0}}, "rope_type='yarn'"),
    ({'rope_scaling': {'rope_type': 'dynamic'}}, "rope_type='dynamic'"),
    ({'rope_scaling': {'rope_type': 'longrope'}}, "rope_type='longrope'"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'is missing'),
    (
      {'rope_theta': 1e4, 'rope_parameters': {'rope_theta': 1e6}},
      r'rope_theta=10000\.0, but rope_parameters\.rope_theta=1000000\.0',
    ),
    ({'num_key_value_heads': 3}, 'num_heads=4 is not a multiple'),
    ({'num_attention_heads': 5}, 'hidden_size=32 is not a multiple'),
    ({'hidden_size': '32'}, "hidden_size='32'"),
    ({'num_hidden_layers': 0}, 'num_hidden_layers=0|num_layers=0'),
    ({'model_type': 'mixtral', 'router_jitter_noise': 0.1}, 'has no noise'),
  ],
)
def test_what_the_decoder_cannot_be_is_refused_by_key_and_value(
  changes: dict, message: str
):
  with pytest.raises(UserError, match=message) as error:
    convert(**changes)
  assert str(error.value).startswith('folder/config.json')


def test_a_window_is_left_out_with_a_warning(caplog):
  model = convert(model_type='mistral', sliding_window=4096)
  assert model.sliding_window == 0
  assert 'sliding_window=4096 is left out' in caplog.text
  caplog.clear()
  convert(model_type='mistral', sliding_window=None)
  assert 'left out' not in caplog.text


def test_keys_that_nobody_reads_are_named_once(caplog):
  convert(foo_bar=3, attention_multiplier=2.0, use_cache=True, pretraining_tp=1)
  [record] = caplog.records
  assert 'no effect: attention_multiplier, foo_bar.' in record.getMessage()


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'config.json does not exist'),
    ('{"a": ', 'config.json is not JSON'),
    ('[]', 'config.json is not a JSON object'),
  ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UserError, match=re.escape(message)):
    hf_config.read_config(tmp_path)
