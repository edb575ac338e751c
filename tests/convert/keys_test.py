"""Tests of the table of names."""

import dataclasses

import jax
import pytest

from grit_jax.checkpoint import flatten
from grit_jax.convert import keys
from grit_jax.models import presets
from grit_jax.models.decoder import Decoder, count_parameters

MODELS = {
  'tiny': presets.tiny(),
  'tied': dataclasses.replace(presets.tiny(), tie_embeddings=True),
  'projection': dataclasses.replace(presets.tiny(), projection_dim=7),
  'experts': presets.tiny_moe(),
  'whole-vocabulary': dataclasses.replace(presets.tiny(), vocab_size=512),
}


@pytest.mark.parametrize('name', MODELS)
def test_the_table_has_every_weight_of_the_decoder_in_its_shape(
  name: str, one_device
):
  model = MODELS[name]
  abstract = jax.eval_shape(lambda: Decoder(model, jax.random.key(0)))
  expected = {path: x.shape for path, x in flatten(abstract).items()}
  assert keys.weight_shapes(model) == expected


@pytest.mark.parametrize('name', MODELS)
def test_the_tensors_hold_every_parameter_once(name: str):
  model = MODELS[name]
  table = keys.tensors(model) + keys.projection_tensors(model)
  assert len({tensor.name for tensor in table}) == len(table)
  assert len({(tensor.path, tensor.index) for tensor in table}) == len(table)
  size = 0
  for tensor in table:
    count = 1
    for length in tensor.shape:
      count *= length
    size += count
  assert size == count_parameters(model)


@pytest.mark.parametrize('family', ['Mistral', 'Llama'])
@pytest.mark.parametrize('tied', [False, True])
def test_names_and_shapes_are_those_of_transformers(family: str, tied: bool):
  transformers = pytest.importorskip('transformers')
  model = dataclasses.replace(presets.tiny(), tie_embeddings=tied)
  theirs = getattr(transformers, f'{family}ForCausalLM')(
    getattr(transformers, f'{family}Config')(
      vocab_size=model.vocab_size,
      hidden_size=model.embed_dim,
      intermediate_size=model.mlp_dim,
      num_hidden_layers=model.num_layers,
      num_attention_heads=model.num_heads,
      num_key_value_heads=model.num_kv_heads,
      head_dim=model.head_dim,
      tie_word_embeddings=tied,
    )
  )
  found = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
  if tied:
    del found['lm_head.weight']  # A second name of the table.
  assert keys.compare(keys.tensors(model), found) == []


def test_every_difference_is_a_line():
  model = dataclasses.replace(presets.tiny(), num_layers=1)
  table = keys.tensors(model)
  found = {tensor.name: tensor.shape for tensor in table}
  found['model.norm.bias'] = (32,)
  found['lm_head.weight'] = (32, 101)
  del found['model.layers.0.mlp.up_proj.weight']
  assert keys.compare(table, found) == [
    'model.layers.0.mlp.up_proj.weight is missing',
    'lm_head.weight is [32, 101], but the config makes it [101, 32]',
    'model.norm.bias [32] is not known',
  ]


def test_names_and_shapes_of_experts_are_those_that_transformers_writes(
  tmp_path,
):
  transformers = pytest.importorskip('transformers')
  safetensors = pytest.importorskip('safetensors')
  model = presets.tiny_moe()
  theirs = transformers.MixtralForCausalLM(
    transformers.MixtralConfig(
      vocab_size=model.vocab_size,
      hidden_size=model.embed_dim,
      intermediate_size=model.mlp_dim,
      num_hidden_layers=model.num_layers,
      num_attention_heads=model.num_heads,
      num_key_value_heads=model.num_kv_heads,
      head_dim=model.head_dim,
      num_local_experts=model.num_experts,
    )
  )
  theirs.save_pretrained(tmp_path)
  with safetensors.safe_open(tmp_path / 'model.safetensors', 'np') as file:
    found = {
      name: tuple(file.get_slice(name).get_shape()) for name in file.keys()
    }
  assert keys.compare(keys.tensors(model), found) == []


def test_seven_billion_weights_of_mistral_are_in_the_table():
  model = presets.mistral_7b()
  assert len(keys.tensors(model)) == 291  # As in the published index.
  shapes = keys.weight_shapes(model)
  assert shapes['blocks/mlp/down'] == (32, 14336, 4096)
  assert shapes['head'] == (4096, 32000)


def test_mixtrals_experts_are_in_the_table():
  model = presets.mixtral_8x7b()
  assert len(keys.tensors(model)) == 3 + 32 * (7 + 24)
  shapes = keys.weight_shapes(model)
  assert shapes['blocks/moe/down'] == (32, 8, 14336, 4096)
  assert shapes['blocks/moe/router'] == (32, 4096, 8)
