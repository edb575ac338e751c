"""`config.json` of Hugging Face, and the model it describes.

Mistral, Mixtral and Llama are one decoder here. Keys are read strictly: one
that means something the decoder cannot do is refused, and one that nobody reads
is named.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from grit_jax.config import ModelConfig, RotaryScalingConfig
from grit_jax.errors import ConfigError, UserError
from grit_jax.files import read_json

CONFIG_FILE = 'config.json'

# What transformers' config classes say where a key is absent. `None` of
# num_key_value_heads is num_attention_heads.
_DEFAULTS = {
  'vocab_size': 32000,
  'hidden_size': 4096,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
  'mistral': _DEFAULTS
  | {
    'intermediate_size': 14336,
    'num_key_value_heads': 8,
    'max_position_embeddings': 131072,
    'sliding_window': 4096,
  },
  'mixtral': _DEFAULTS
  | {
    'intermediate_size': 14336,
    'num_key_value_heads': 8,
    'max_position_embeddings': 131072,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1000000.0,
    'sliding_window': None,
    'num_local_experts': 8,
    'num_experts_per_tok': 2,
  },
  'llama': _DEFAULTS
  | {
    'intermediate_size': 11008,
    'num_key_value_heads': None,
    'max_position_embeddings': 2048,
  },
}

# Keys whose other values describe another model: the values that are this
# decoder, and what it lacks.
_NO_BIASES = ((False, None), 'the decoder has no biases')
_NO_EXPERTS = ((0, None), 'the decoder has experts as Mixtral has them alone')
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
  'hidden_act': (('silu', 'swish'), "the decoder's activation is silu"),
  'attention_bias': _NO_BIASES,
  'mlp_bias': _NO_BIASES,
  'quantization_config': ((None,), 'quantized weights cannot be trained'),
  'router_jitter_noise': ((0, None), 'the router has no noise'),
  'num_experts': _NO_EXPERTS,
  'n_routed_experts': _NO_EXPERTS,
}
_WHOLE_ROTARY = ((1, None), 'the decoder rotates the whole of every head')

# Keys that change no weight and no output here. Ids are the tokenizer's, the
# dtype is that of the weights, and GRIT chooses its own attention.
_NEUTRAL = (
  '_name_or_path', 'architectures', 'attention_dropout', 'bos_token_id',
  'dtype', 'eos_token_id', 'initializer_range', 'model_type',
  'output_router_logits', 'pad_token_id', 'pretraining_tp',
  'router_aux_loss_coef', 'torch_dtype', 'transformers_version', 'use_cache',
)  # fmt: skip

# Where the rotary positions are described: transformers 5, 4, and both.
_ROTARY_GROUPS = ('rope_parameters', 'rope_scaling')
_ROTARY_KEYS = (
  'rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings'
)  # fmt: skip


def read_config(folder: epath.PathLike) -> dict[str, Any]:
  """Reads a folder's config.json.

  Raises:
    UserError: there is none, or it is not a JSON object.
  """
  return read_json(epath.Path(folder) / CONFIG_FILE)


def to_model(config: Mapping[str, Any], where: str) -> ModelConfig:
  """Returns the model that a config.json describes.

  A sliding window is left out, with a warning. What is not the architecture's,
  such as `param_dtype`, has its default.

  Args:
    config: of `model_type` mistral, mixtral or llama, as transformers 4 or 5
      writes it.
    where: the file's path, for messages.

  Raises:
    UserError: the decoder cannot be this model, or the sizes contradict
      each other; the message names `where`, the key and the value.
  """
  family = _family(config, where)
  for key, (allowed, reason) in _ONLY.items():
    if key in config:
      _check_only(f'{where}: {key}', config[key], allowed, reason)
  rotary = _join_rotary(config, where)
  keys = _Keys({**DEFAULTS[family], **config}, where)
  heads, dim = keys.size('num_attention_heads'), keys.size('hidden_size')
  if config.get('head_dim') is None and dim % heads:
    raise UserError(
      f'{where}: hidden_size={dim} is not a multiple of num_attention_heads='
      f'{heads}, and there is no head_dim.'
    )
  theta, scaling, unread = _rotary(rotary, where)
  experts: dict[str, Any] = {}
  if family == 'mixtral':
    experts = {
      'num_experts': keys.size('num_local_experts'),
      'experts_per_token': keys.size('num_experts_per_tok'),
    }
  model = ModelConfig(
    family='llama' if family == 'llama' else 'mistral',
    **experts,
    vocab_size=keys.size('vocab_size'),
    embed_dim=dim,
    num_layers=keys.size('num_hidden_layers'),
    num_heads=heads,
    num_kv_heads=keys.size('num_key_value_heads', heads),
    head_dim=keys.size('head_dim', dim // heads),
    mlp_dim=keys.size('intermediate_size'),
    rope_theta=theta,
    rotary_scaling=scaling,
    max_positions=keys.size('max_position_embeddings'),
    norm_epsilon=keys.number('rms_norm_eps'),
    tie_embeddings=keys.boolean('tie_word_embeddings'),
  )
  try:
    model.validate()
  except ConfigError as error:
    raise UserError(f'{where}: {error}') from error
  if family != 'llama':
    _report_window(keys.read('sliding_window'), where)
  known = {*keys.found, *_NEUTRAL, *_ONLY, *_ROTARY_GROUPS, *_ROTARY_KEYS}
  if config.get('is_causal'):
    known.add('is_causal')
  unread |= set(config) - known
  if unread:
    logging.warning(
      '%s: these keys are not known and have no effect: %s.',
      where,
      ', '.join(sorted(unread)),
    )
  return model


def from_model(
  model: ModelConfig, dtype: str, bos: int, eos: int
) -> dict[str, Any]:
  """Returns the config.json of an export.

  Its keys are those of transformers 4, which 5 reads too. It is a
  `MistralForCausalLM` or `LlamaForCausalLM`, as the model's family says, and
  with experts a `MixtralForCausalLM`. `is_causal` is there for
  sentence-transformers, which overrides a key only where there is one.

  Args:
    model: the model.
    dtype: of the exported weights.
    bos: id of `<s>`.
    eos: id of `</s>`.
  """
  scaling = model.rotary_scaling
  config = {
    'architectures': ['MistralForCausalLM'],
    'attention_dropout': 0.0,
    'bos_token_id': bos,
    'eos_token_id': eos,
    'head_dim': model.head_dim,
    'hidden_act': 'silu',
    'hidden_size': model.embed_dim,
    'initializer_range': 0.02,
    'intermediate_size': model.mlp_dim,
    'is_causal': True,
    'max_position_embeddings': model.max_positions,
    'model_type': 'mistral',
    'num_attention_heads': model.num_heads,
    'num_hidden_layers': model.num_layers,
    'num_key_value_heads': model.num_kv_heads,
    'rms_norm_eps': model.norm_epsilon,
    'rope_theta': model.rope_theta,
    'tie_word_embeddings': model.tie_embeddings,
    'torch_dtype': dtype,
    'use_cache': True,
    'vocab_size': model.vocab_size,
  }
  if model.family == 'llama':
    config |= {
      'architectures': ['LlamaForCausalLM'],
      'attention_bias': False,
      'mlp_bias': False,
      'model_type': 'llama',
      'rope_scaling': None,
    }
    if scaling.kind != 'none':
      config['rope_scaling'] = _rope_scaling(scaling)
    return dict(sorted(config.items()))
  config['sliding_window'] = model.sliding_window or None
  if model.num_experts:
    config |= {
      'architectures': ['MixtralForCausalLM'],
      'model_type': 'mixtral',
      'num_experts_per_tok': model.experts_per_token,
      'num_local_experts': model.num_experts,
      'output_router_logits': False,
      'router_aux_loss_coef': 0.02,
      'router_jitter_noise': 0.0,
    }
  return dict(sorted(config.items()))


def _rope_scaling(scaling: RotaryScalingConfig) -> dict[str, Any]:
  if scaling.kind == 'linear':
    # Before transformers 4.43 there had to be these two keys.
    return {'type': 'linear', 'factor': scaling.factor}
  return {
    'rope_type': 'llama3',
    'factor': scaling.factor,
    'low_freq_factor': scaling.low_frequency_factor,
    'high_freq_factor': scaling.high_frequency_factor,
    'original_max_position_embeddings': scaling.original_positions,
  }


def _family(config: Mapping[str, Any], where: str) -> str:
  family = config.get('model_type')
  if family not in DEFAULTS:
    raise UserError(
      f'{where}: model_type={family!r} is not one of {", ".join(DEFAULTS)}.'
    )
  return family


def _check_only(
  what: str, value: Any, allowed: tuple[Any, ...], reason: str
) -> None:
  if value not in allowed:
    raise UserError(f'{what}={value!r} cannot be converted: {reason}.')


def _join_rotary(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns all that is said of rotary positions, in whichever style.

  Raises:
    UserError: two places contradict each other.
  """
  groups = {'': {key: config[key] for key in _ROTARY_KEYS if key in config}}
  for name in _ROTARY_GROUPS:
    group = config.get(name) or {}
    if not isinstance(group, dict) or any(
      isinstance(value, dict) for value in group.values()
    ):
      raise UserError(
        f'{where}: {name}={group!r} is not one group of values for all layers.'
      )
    groups[f'{name}.'] = dict(group)
  joined: dict[str, tuple[str, Any]] = {}
  for prefix, group in groups.items():
    for key, value in group.items():
      name = 'rope_type' if key == 'type' else key
      before = joined.setdefault(name, (prefix + key, value))
      if before[1] != value:
        raise UserError(
          f'{where}: {before[0]}={before[1]!r}, but {prefix}{key}={value!r}.'
        )
  return {name: value for name, (_, value) in joined.items()}


def _rotary(
  rotary: dict[str, Any], where: str
) -> tuple[float, RotaryScalingConfig, set[str]]:
  """Returns theta, the scaling, and the keys that nobody reads."""
  keys = _Keys({'rope_type': 'default', **_DEFAULTS, **rotary}, where)
  _check_only(
    f'{where}: partial_rotary_factor',
    rotary.get('partial_rotary_factor'),
    *_WHOLE_ROTARY,
  )
  theta, kind = keys.number('rope_theta'), keys.read('rope_type')
  if kind == 'default':
    scaling = RotaryScalingConfig()
  elif kind == 'linear':
    scaling = RotaryScalingConfig('linear', keys.number('factor'))
  elif kind == 'llama3':
    scaling = RotaryScalingConfig(
      'llama3',
      factor=keys.number('factor'),
      low_frequency_factor=keys.number('low_freq_factor'),
      high_frequency_factor=keys.number('high_freq_factor'),
      original_positions=keys.size('original_max_position_embeddings'),
    )
  else:
    raise UserError(
      f'{where}: rope_type={kind!r} is not one of default, linear, llama3.'
    )
  return theta, scaling, set(rotary) - keys.found - {'partial_rotary_factor'}


def _report_window(window: Any, where: str) -> None:
  if window is not None:
    logging.warning(
      '%s: sliding_window=%s is left out. GRIT trains over the whole text, and '
      'a window under bidirectional attention would be another model.',
      where,
      window,
    )


class _Keys:
  """Values of a JSON object by key and type; knows which keys were read."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self._values, self._where = values, where
    self.found: set[str] = set()

  def read(self, key: str) -> Any:
    self.found.add(key)
    if key not in self._values:
      raise UserError(f'{self._where}: {key} is missing.')
    return self._values[key]

  def size(self, key: str, absent: int | None = None) -> int:
    if absent is not None and self._values.get(key) is None:
      self.found.add(key)
      return absent
    return self._typed(key, int, 'a whole number above 0')

  def number(self, key: str) -> float:
    return float(self._typed(key, (int, float), 'a number above 0'))

  def boolean(self, key: str) -> bool:
    return self._typed(key, bool, 'true or false')

  def _typed(self, key: str, kind: Any, name: str) -> Any:
    value = self.read(key)
    fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is not bool and not value > 0):
      raise UserError(f'{self._where}: {key}={value!r} is not {name}.')
    return value
