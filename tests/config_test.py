"""Tests of the configuration's checks."""

import dataclasses
import math
import re
import typing
from typing import Annotated, Any, Literal

import ml_collections
import pytest

from grit_jax.config import (
  ATTENTION_MODES,
  Config,
  DataConfig,
  LoraConfig,
  parse_numbers,
  resolve,
  to_config_dict,
)
from grit_jax.errors import ConfigError
from grit_jax.models import presets


def make_config() -> ml_collections.ConfigDict:
  """A valid configuration, every field of it."""
  return to_config_dict(Config(data=DataConfig(paths='records.jsonl')))


def override(key: str, value: object) -> ml_collections.ConfigDict:
  """The valid configuration with one key changed, whatever its type."""
  values = make_config().to_dict()
  *groups, name = key.split('.')
  group = values
  for part in groups:
    group = group[part]
  group[name] = value
  return ml_collections.ConfigDict(values)


def test_resolve_undoes_to_config_dict():
  config = Config(seed=3, data=DataConfig(paths='a.jsonl,b'))
  assert resolve(to_config_dict(config)) == config


def test_fields_left_out_keep_their_defaults():
  config = resolve(ml_collections.ConfigDict({'data': {'paths': 'a.jsonl'}}))
  assert config == Config(data=DataConfig(paths='a.jsonl'))


def test_flags_can_override_every_field():
  config = make_config()
  config.update_from_flattened_dict(
    {'optimizer.learning_rate': 1e-4, 'model.attention': 'cccc', 'steps': 7}
  )
  resolved = resolve(config)
  assert resolved.optimizer.learning_rate == 1e-4
  assert resolved.model.attention == 'cccc'
  assert resolved.steps == 7


def test_resolved_config_is_frozen():
  config = resolve(make_config())
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.model.num_layers = 1


@pytest.mark.parametrize(
  ('key', 'meant'),
  [
    ('optimizer.learning_rat', 'optimizer.learning_rate'),
    ('model.num_layer', 'model.num_layers'),
    ('step', 'steps'),
    ('optimiser', 'optimizer'),
  ],
)
def test_an_unknown_key_raises_and_suggests_the_known_one(key: str, meant: str):
  message = f'{key} is not a configuration key. Did you mean {meant}?'
  with pytest.raises(ConfigError, match=re.escape(message)):
    resolve(override(key, 1))


def test_an_unknown_key_like_none_raises_without_a_suggestion():
  with pytest.raises(ConfigError) as error:
    resolve(override('data.qqq', 1))
  assert str(error.value) == 'data.qqq is not a configuration key.'


@pytest.mark.parametrize(
  ('key', 'value', 'kind'),
  [
    ('steps', 10.0, 'int'),
    ('steps', True, 'int'),
    ('seed', '0', 'int'),
    ('evaluation.enabled', 1, 'bool'),
    ('optimizer.learning_rate', '1e-5', 'float'),
    ('optimizer.clip_norm', True, 'float'),
    ('model.attention', 4, 'str'),
    ('data.paths', ('a', 'b'), 'str'),
    ('data.cache_dir', None, 'str'),
  ],
)
def test_a_value_of_another_type_raises(key: str, value: object, kind: str):
  message = f'{key}={value!r} is of type {type(value).__name__}, not {kind}.'
  with pytest.raises(ConfigError, match=re.escape(message)):
    resolve(override(key, value))


def test_a_value_in_the_place_of_a_group_raises():
  with pytest.raises(ConfigError, match='model is a group of keys, not 7'):
    resolve(override('model', 7))


def test_a_whole_number_is_a_float():
  rate = resolve(override('optimizer.learning_rate', 1)).optimizer.learning_rate
  assert type(rate) is float


def fields(group: type = Config, prefix: str = '') -> dict[str, Any]:
  """Returns the types of all keys, with their bounds."""
  found = {}
  for name, kind in typing.get_type_hints(group, include_extras=True).items():
    if dataclasses.is_dataclass(kind):
      found |= fields(kind, f'{prefix}{name}.')
    else:
      found[prefix + name] = kind
  return found


def beyond(kind: Any) -> list:
  """Returns what lies right outside of a type's bounds, or is no choice."""
  if typing.get_origin(kind) is Literal:
    return ['', 'nonsense', typing.get_args(kind)[0].upper()]
  if typing.get_origin(kind) is not Annotated:
    return []
  number, bounds = typing.get_args(kind)
  if number is int:
    return [bounds.least - 1, bounds.most + 1, -(10**30), 10**30]
  least = bounds.least if 'least' in bounds.open_ else bounds.least - 1e-3
  most = bounds.most if 'most' in bounds.open_ else bounds.most * 1.1
  return [float(least), float(most), math.inf, -math.inf, math.nan]


OUT_OF_BOUNDS = [
  (key, value) for key, kind in fields().items() for value in beyond(kind)
]
# What bounds do not say.
WRONG = [
  *((f'model.{name}', 0) for name in ('embed_dim', 'num_heads')),
  ('model.rotary_scaling.high_frequency_factor', 1.0),
  ('model.num_kv_heads', 5),
  ('model.head_dim', 7),
  ('model.attention', 'cbbc'),
  *(
    (f'data.{name}', value)
    for name in ('weights', 'caps')
    for value in (
      'a', '=2', 'a=', 'a=x', 'a=1,', 'a=2,a=3', 'a=-1', 'a=nan', 'a=inf'
    )
  ),
  ('data.caps', 'a=0'),
  ('data.caps', 'a=1.5'),
  ('data.negatives', 'in_batch'),  # with two passages a query
  ('data.max_query_tokens', 2049),
  ('data.max_passage_tokens', 2049),
  ('data.max_generative_tokens', 2049),
  ('data.generative_batch', 12),
  ('lora.targets', 'router'),
  ('mesh.data', 0),
  ('mesh.fsdp', 0),
  ('profile.steps', 'all'),
  ('profile.steps', '10-'),
  ('profile.steps', '10-15-20'),
  ('profile.steps', '0'),
  ('profile.steps', '0-2'),
  ('profile.steps', '15-10'),
  ('profile.steps', '10-9999'),
]  # fmt: skip


@pytest.mark.parametrize(('key', 'value'), [*OUT_OF_BOUNDS, *WRONG])
def test_a_value_that_cannot_be_raises_and_names_the_key(
  key: str, value: object
):
  with pytest.raises(ConfigError, match=re.escape(f'{key}={value!r}')):
    resolve(override(key, value))


def test_a_config_without_data_raises_and_names_the_key():
  with pytest.raises(ConfigError, match=r'data\.paths is empty'):
    resolve(override('data.paths', ''))


def test_targets_that_come_twice_and_dropout_of_experts_are_refused():
  with pytest.raises(ConfigError, match=r"'q, v,q' names a projection twice"):
    resolve(override('lora.targets', 'q, v,q'))
  model = presets.mixtral_8x7b()
  config = Config(
    model=model,
    data=DataConfig(paths='pairs.jsonl'),
    lora=LoraConfig(rank=4, dropout=0.1),
  )
  with pytest.raises(ConfigError, match=r'lora\.dropout=0\.1: .* have none'):
    config.validate()
  attention = dataclasses.replace(config.lora, targets='q,v')
  dataclasses.replace(config, lora=attention).validate()


def test_every_key_has_bounds_or_a_check_of_its_own():
  # `data.paths` has its own test. What cannot be wrong: paths that are read
  # elsewhere.
  free = {'data.paths', 'data.tokenizer', 'data.cache_dir', 'init_from'}
  keys = {key for key, kind in fields().items() if kind is not bool}
  assert keys - free == {key for key, _ in [*OUT_OF_BOUNDS, *WRONG]}


def test_an_architecture_of_init_from_needs_one_and_nothing_beside_it():
  of_init_from = make_config()
  of_init_from.init_from = 'folder'
  of_init_from.model.vocab_size = of_init_from.model.embed_dim = 0
  assert resolve(of_init_from).model == presets.of_init_from()
  of_init_from.model.num_layers = 3
  with pytest.raises(ConfigError, match=r'model\.num_layers=3 is set, but'):
    resolve(of_init_from)


def test_evaluations_at_intervals_need_the_evaluation():
  values = make_config()
  values.evaluation.enabled, values.evaluation.every_steps = False, 10
  message = r'evaluation\.every_steps=10, but evaluation\.enabled is False'
  with pytest.raises(ConfigError, match=message):
    resolve(values)


@pytest.mark.parametrize('kind', ['query', 'passage', 'generative'])
def test_texts_may_not_be_longer_than_the_positions(kind: str):
  values = make_config()
  setattr(values.data, f'max_{kind}_tokens', 1025)
  for other in {'query', 'passage', 'generative'} - {kind}:
    setattr(values.data, f'max_{other}_tokens', 1024)
  values.model.max_positions = 1024
  message = f'data.max_{kind}_tokens=1025 is more than model.max_positions=1024'
  with pytest.raises(ConfigError, match=re.escape(message)):
    resolve(values)


@pytest.mark.parametrize(
  ('entry', 'problem'),
  [
    ('b=2=x', 'is not NAME=NUMBER'),
    ('b=-0.5', 'is negative'),
    ('b=nan', 'is not NAME=NUMBER'),
  ],
)
def test_a_wrong_number_of_a_data_set_is_named(entry: str, problem: str):
  for key in ('data.weights', 'data.caps'):
    text = f'a=1,{entry}'
    message = f'{key}={text!r}: {entry!r} {problem}'
    with pytest.raises(ConfigError, match=re.escape(message)):
      resolve(override(key, text))


def test_numbers_of_data_sets_are_parsed():
  assert parse_numbers('key', '') == {}
  # A name may have an equals sign, since a file's may.
  found = parse_numbers('key', 'a=2, b = 0.5,c=d=0,e=1e3')
  assert found == {'a': 2.0, 'b': 0.5, 'c=d': 0.0, 'e': 1000.0}


@pytest.mark.parametrize(
  ('negatives', 'passages', 'message'),
  [
    ('hard', 1, "negatives='hard' .* data.num_passages=1 takes none"),
    ('in_batch', 2, "negatives='in_batch' .* data.num_passages=1, not 2"),
  ],
)
def test_choices_of_negatives_that_contradict_the_passages_raise(
  negatives: str, passages: int, message: str
):
  values = make_config()
  values.data.negatives, values.data.num_passages = negatives, passages
  with pytest.raises(ConfigError, match=message):
    resolve(values)
  values.data.num_passages = 3 - passages
  resolve(values)


@pytest.mark.parametrize(
  ('negatives', 'passages', 'pairs'),
  [('all', 3, 16 * 3), ('hard', 3, 4 * 3), ('in_batch', 1, 16)],
)
def test_compared_pairs_are_queries_times_passages(negatives, passages, pairs):
  data = DataConfig(
    embedding_batch=4, num_passages=passages, negatives=negatives
  )
  assert data.compared_pairs == pairs


@pytest.mark.parametrize(
  ('steps', 'expected'),
  [('', []), ('10', [10]), ('10-10', [10]), ('9-11', [9, 10, 11])],
)
def test_profile_steps_are_a_step_or_a_range_with_both_ends(steps, expected):
  profile = resolve(override('profile.steps', steps)).profile
  assert list(profile.step_range()) == expected


def test_two_axes_of_minus_one_raise():
  with pytest.raises(ConfigError, match='mesh: only one .*data=-1, fsdp=-1'):
    resolve(override('mesh.data', -1))


@pytest.mark.parametrize(
  ('family', 'changes'),
  [
    ('llama', {'model.num_experts': 8}),
    ('llama', {'model.sliding_window': 4}),
    ('mistral', {'model.rotary_scaling.kind': 'llama3'}),
  ],
)
def test_a_family_has_what_its_exports_can_say(family: str, changes: dict):
  values = make_config()
  values.update_from_flattened_dict({'model.family': family, **changes})
  [key] = changes
  with pytest.raises(ConfigError, match=f'{key}=.* needs model.family='):
    resolve(values)


@pytest.mark.parametrize('mode', ATTENTION_MODES)
def test_every_attention_mode_is_valid(mode: str):
  assert resolve(override('model.attention', mode)).model.attention == mode


@pytest.mark.parametrize('mode', ['bbbb', 'bbcb', 'cccb'])
def test_a_bidirectional_generative_text_is_refused(mode: str):
  with pytest.raises(ConfigError, match=f'{mode}.* let the loss see'):
    resolve(override('model.attention', mode))


def test_groups_matter_only_to_the_mixed_reduction():
  values = make_config()
  values.data.generative_batch = 12
  for changes in (
    {'objective.generative_reduction': 'token'},
    {'objective.mode': 'embedding'},
  ):
    config = values.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    resolve(config)


@pytest.mark.parametrize(
  ('mode', 'streams'),
  [
    ('unified', (True, True)),
    ('embedding', (True, False)),
    ('generative', (False, True)),
  ],
)
def test_a_mode_has_its_streams(mode: str, streams: tuple[bool, bool]):
  objective = resolve(override('objective.mode', mode)).objective
  assert (objective.has_embedding, objective.has_generative) == streams
