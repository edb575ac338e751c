"""What sentence-transformers reads of an export, besides transformers' files.

Its modules are the decoder, a pooling, the projection if there is one, and a
normalisation. Its pooling leaves out the prompt, `<s><|user|>\n...<|embed|>\n`,
as training does.
"""

from typing import Any

from grit_jax.config import Config, ModelConfig
from grit_jax.convert.keys import PROJECTION_FOLDER
from grit_jax.data.formats import EMBED

# Tokens of a text that are read by default, as by the gritlm package.
_MAX_TOKENS = 512

_POOLINGS = {
  'mean': 'pooling_mode_mean_tokens',
  'cls': 'pooling_mode_cls_token',
  'lasttoken': 'pooling_mode_lasttoken',
}
_UNUSED = (
  'pooling_mode_max_tokens',
  'pooling_mode_mean_sqrt_len_tokens',
  'pooling_mode_weightedmean_tokens',
)


def max_tokens(model: ModelConfig) -> int:
  """Returns the tokens at which texts are cut, the prompt's among them."""
  return min(_MAX_TOKENS, model.max_positions)


def find_obstacle(config: Config) -> str:
  """Returns why sentence-transformers cannot embed as the run did.

  It is a sentence for people; '' where nothing is in the way.
  """
  model = config.model
  if not config.objective.has_embedding:
    return 'The model was trained to generate alone.'
  if model.attention[:2] not in ('bb', 'cc'):
    return (
      f'With attention `{model.attention}` a part of the embedding prompt is '
      'bidirectional and the rest causal; no tool but grit_jax has such a mask.'
    )
  if model.pooling not in _POOLINGS:
    return (
      f'With `{model.pooling}` pooling a token weighs as much as its place in '
      'the text says; sentence-transformers counts from the start of the '
      'prompt.'
    )
  return ''


def describe_modules(model: ModelConfig) -> dict[str, Any]:
  """Returns the JSON files of an export that has no obstacle.

  Args:
    model: the model.

  Returns:
    Their contents by path, but for the projection's.
  """
  parts = [('', 'Transformer'), ('1_Pooling', 'Pooling')]
  if model.projection_dim:
    parts.append((PROJECTION_FOLDER, 'Dense'))
  parts.append((f'{len(parts)}_Normalize', 'Normalize'))
  modules = [
    {
      'idx': index,
      'name': str(index),
      'path': path,
      'type': f'sentence_transformers.models.{kind}',
    }
    for index, (path, kind) in enumerate(parts)
  ]
  causal = model.attention.startswith('cc')
  return {
    'modules.json': modules,
    '1_Pooling/config.json': _describe_pooling(model),
    'sentence_bert_config.json': {
      'max_seq_length': max_tokens(model),
      # Replaces that of config.json, for embedding alone.
      'config_args': {'is_causal': causal},
    },
    'config_sentence_transformers.json': _describe_prompts(causal),
  }


def describe_projection(model: ModelConfig) -> dict[str, Any]:
  """Returns the JSON file of the projection, by path.

  It is of use without the other modules too: to convert the export back.
  """
  return {
    f'{PROJECTION_FOLDER}/config.json': {
      'in_features': model.embed_dim,
      'out_features': model.projection_dim,
      'bias': True,
      'activation_function': 'torch.nn.modules.linear.Identity',
    }
  }


def _describe_pooling(model: ModelConfig) -> dict[str, Any]:
  """Returns the pooling in the keys that every version, and others, read."""
  return {
    'word_embedding_dimension': model.embed_dim,
    **{key: model.pooling == name for name, key in _POOLINGS.items()},
    **dict.fromkeys(_UNUSED, False),
    # The first token of the prompt is `cls`; the last one of all is never the
    # prompt's.
    'include_prompt': model.pooling != 'mean',
  }


def _describe_prompts(causal: bool) -> dict[str, Any]:
  description = {
    'prompts': {'query': EMBED, 'document': EMBED},
    'default_prompt_name': 'document',
    'similarity_fn_name': 'cosine',
  }
  if not causal:
    description['requirements'] = {
      'transformers': {
        'specifier': '>=5.2',
        'reason': 'Earlier versions have no bidirectional attention here.',
      }
    }
  return description
