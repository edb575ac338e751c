"""README.md of an export: what the model is, and how each tool loads it."""

import string

import sentencepiece

from grit_jax.config import Config, ModelConfig
from grit_jax.convert import hf_config, snippets
from grit_jax.convert.keys import PROJECTION_FOLDER
from grit_jax.convert.sentence_transformers import find_obstacle, max_tokens
from grit_jax.data.formats import ASSISTANT, EMBED, USER
from grit_jax.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from grit_jax.models.decoder import count_parameters

_ATTENTION = {'b': 'bidirectional', 'c': 'causal'}
_POOLING = {
  'mean': "the mean of the text's last hidden states",
  'weightedmean': "the mean of the text's last hidden states, weighted 1, 2, "
  '3, ... along the text',
  'cls': "the last hidden state of the prompt's first token",
  'lasttoken': "the last hidden state of the text's last token",
}
_KNOWN_TOKENIZERS = ', if it knows the tokenizer, such as that of Llama 3'
# The tokens by which vLLM finds where a text begins: those of Mistral.
_VLLM_USER = ['▁<', '|', 'user', '|', '>', '<0x0A>']
_VLLM_EMBED = ['|', 'embed', '|', '>', '<0x0A>']


def write_card(
  config: Config, tokenizer: Tokenizer, dtype: str, name: str
) -> str:
  """Returns the README.md of an export.

  Args:
    config: of the run.
    tokenizer: its tokenizer.
    dtype: of the exported weights.
    name: of the model.
  """
  parts = [
    _front_matter(config),
    _introduction(config, name),
    _table(config, tokenizer, dtype),
    _format(config, tokenizer),
  ]
  if config.objective.has_embedding:
    parts += _embedding(config, tokenizer)
  if config.objective.has_generative:
    parts += _generation(config, tokenizer)
  return '\n\n'.join(part.strip() for part in parts) + '\n'


def is_for_gritlm(config: Config) -> bool:
  """Whether PyTorch gritlm embeds as the run did: it loads no projection."""
  model = config.model
  return (
    config.objective.has_embedding
    and model.attention[:2] in ('bb', 'cc')
    and not model.projection_dim
  )


def is_for_vllm(config: Config, tokenizer: Tokenizer) -> bool:
  """Whether vLLM's GritLM class embeds as the run did.

  It knows a decoder without experts, bidirectional attention without a window,
  the mean, and a text's beginning by tokens of Mistral's vocabulary.
  """
  model = config.model
  if (
    SENTENCEPIECE_FILE not in tokenizer.files
    or (model.attention[:2], model.pooling) != ('bb', 'mean')
    or model.projection_dim
    or model.sliding_window
    or model.num_experts
  ):
    return False
  processor = sentencepiece.SentencePieceProcessor(
    model_proto=tokenizer.files[SENTENCEPIECE_FILE]
  )
  long = processor.encode(f'{USER}a\n{EMBED}', out_type=str)
  return (
    long[: len(_VLLM_USER)] == _VLLM_USER
    and long[-len(_VLLM_EMBED) - 2 :] == ['<0x0A>', '<', *_VLLM_EMBED]
    and processor.encode(EMBED, out_type=str) == ['▁<', *_VLLM_EMBED]
  )


def least_transformers(model: ModelConfig, tokenizer: Tokenizer) -> str:
  """Returns a version of transformers that was seen to load such a model.

  Causally, that is. What is of the usual kind loads in 4.37 already; a head
  size of its own, rotary scaling and a tokenizer.json of today need later ones.
  """
  if model.num_heads * model.head_dim != model.embed_dim:
    return '4.57' if model.num_experts else '4.45'
  plain = model.rotary_scaling.kind != 'llama3'
  return '4.37' if plain and SENTENCEPIECE_FILE in tokenizer.files else '4.45'


def _front_matter(config: Config) -> str:
  tags = ['grit']
  library, task = 'transformers', 'text-generation'
  if is_for_gritlm(config):
    tags.append('gritlm')
  if config.objective.has_generative:
    tags.append('text-generation')
  else:
    task = 'feature-extraction'
  if config.objective.has_embedding:
    tags.append('feature-extraction')
  if not find_obstacle(config):
    tags += ['sentence-transformers', 'sentence-similarity', 'mteb']
    if not config.objective.has_generative:
      library, task = 'sentence-transformers', 'sentence-similarity'
  lines = [f'library_name: {library}', f'pipeline_tag: {task}', 'tags:']
  return '\n'.join(['---', *lines, *(f'- {tag}' for tag in tags), '---'])


def _introduction(config: Config, name: str) -> str:
  does = {
    'unified': 'embeds texts and answers prompts',
    'embedding': 'embeds texts',
    'generative': 'answers prompts',
  }[config.objective.mode]
  # A model that was converted has seen no data here.
  how = 'trained with' if config.data.paths else 'converted by'
  return (
    f'# {name}\n\nA language model that {does}, {how} grit_jax for\n'
    '[generative representational instruction tuning]'
    '(https://arxiv.org/abs/2402.09906).\n'
    'All settings are in `grit_jax.json`.'
  )


def _table(config: Config, tokenizer: Tokenizer, dtype: str) -> str:
  model, data, optimizer = config.model, config.data, config.optimizer
  exported = hf_config.from_model(model, dtype, tokenizer.bos, tokenizer.eos)
  experts = ''
  if model.num_experts:
    experts = (
      f'{model.num_experts} experts, {model.experts_per_token} a token, '
    )
  rows = {
    'architecture': f'{exported["architectures"][0]}: {model.num_layers} '
    f'layers, {model.embed_dim} wide, {model.num_heads} heads '
    f'({model.num_kv_heads} of keys and values), {experts}vocabulary of '
    f'{model.vocab_size}',
    'parameters': f'{count_parameters(model):,}, {dtype}',
    'positions': f'{model.max_positions}',
    'attention': _describe_attention(config),
  }
  if config.objective.has_embedding:
    width = model.projection_dim or model.embed_dim
    mapped = ', mapped linearly' if model.projection_dim else ''
    rows['embedding'] = (
      f'{_POOLING[model.pooling]}{mapped}, scaled to length 1: {width} numbers'
    )
  if data.paths:
    batches, limits = [], []
    if config.objective.has_embedding:
      batches.append(
        f'{data.embedding_batch} queries with {data.num_passages} passages '
        f'each (temperature {config.objective.temperature:g})'
      )
      limits.append(
        f'queries of up to {data.max_query_tokens} tokens, passages of up to '
        f'{data.max_passage_tokens}'
      )
    if config.objective.has_generative:
      batches.append(f'{data.generative_batch} conversations')
      limits.append(f'conversations of up to {data.max_generative_tokens}')
    rows['trained on'] = ', '.join(limits)
    rows['training'] = (
      f'{config.steps} steps of {" and ".join(batches)}; AdamW, learning rate '
      f'{optimizer.learning_rate:g}, {optimizer.schedule}'
    )
  lines = [f'| {name} | {value} |' for name, value in rows.items()]
  return '\n'.join(['| | |', '|---|---|', *lines])


def _describe_attention(config: Config) -> str:
  mode = config.model.attention
  kinds = []
  for used, what, letters in (
    (config.objective.has_embedding, 'embedding', mode[:2]),
    (config.objective.has_generative, 'generation', mode[2:]),
  ):
    if used and letters[0] == letters[1]:
      kinds.append(f'{_ATTENTION[letters[0]]} for {what}')
    elif used:
      first, second = (_ATTENTION[letter] for letter in letters)
      kinds.append(
        f'for {what} {first} in the instruction and {second} in the text'
      )
  return f'`{mode}`: {", ".join(kinds)}'


def _format(config: Config, tokenizer: Tokenizer) -> str:
  bos, eos = tokenizer.bos_piece, tokenizer.eos_piece
  parts = ['## Prompt format']
  if config.objective.has_embedding:
    parts.append(
      'A text to embed, with an instruction and without:\n\n'
      f'```\n{bos}{USER}{{instruction}}\n{EMBED}{{text}}\n```\n\n'
      f'```\n{bos}{EMBED}{{text}}\n```'
    )
  if config.objective.has_generative:
    exchange = f'{USER}{{question}}\n{ASSISTANT}{{answer}}{eos}'
    parts.append(
      'A conversation, whose answers have no white space at their ends:\n\n'
      f'```\n{bos}{exchange}\n{exchange}\n```'
    )
  return '\n\n'.join(parts)


def _fill(
  template: string.Template,
  config: Config,
  tokenizer: Tokenizer,
  **values: str,
) -> str:
  causal = config.model.attention.startswith('cc')
  version = least_transformers(config.model, tokenizer)
  known = '' if SENTENCEPIECE_FILE in tokenizer.files else _KNOWN_TOKENIZERS
  return template.substitute(
    folder=snippets.FOLDER,
    bos=f'`{tokenizer.bos_piece}`',
    user=USER.strip(),
    embed=EMBED.strip(),
    tokens=max_tokens(config.model),
    requires='' if causal else " 'transformers>=5.2'",
    version=version if causal else '5.2',
    causal_version=version,
    known=known,
    **values,
  )


def _embedding(config: Config, tokenizer: Tokenizer) -> list[str]:
  model = config.model
  parts = ['## Embedding']
  obstacle = find_obstacle(config)
  if model.attention[:2] not in ('bb', 'cc'):
    return [*parts, obstacle]
  if obstacle:
    parts.append(f'Not with sentence-transformers. {obstacle}')
  else:
    for template in snippets.SENTENCE_TRANSFORMERS, snippets.MTEB:
      parts.append(_fill(template, config, tokenizer))
  causal = model.attention.startswith('cc')
  if is_for_gritlm(config):
    attention = 'cccc' if causal else 'bbcc'
    pooling = model.pooling
    parts.append(
      _fill(
        snippets.GRITLM,
        config,
        tokenizer,
        attention=attention,
        pooling=pooling,
      )
    )
    if config.objective.has_generative:
      parts.append(snippets.GRITLM_UNIFIED)
  else:
    parts.append(
      'Not with PyTorch gritlm, which would leave the projection '
      f'(`{PROJECTION_FOLDER}`) out.'
    )
  projection = ''
  if model.projection_dim:
    projection = snippets.PROJECTION.substitute(path=PROJECTION_FOLDER)
  parts.append(
    _fill(
      snippets.TRANSFORMERS_EMBEDDING,
      config,
      tokenizer,
      causal='' if causal else ', is_causal=False',
      weights=snippets.WEIGHTS[model.pooling],
      projection=projection,
    )
  )
  if not causal:
    parts.append(snippets.EARLIER_TRANSFORMERS)
  if is_for_vllm(config, tokenizer):
    parts.append(_fill(snippets.VLLM_EMBEDDING, config, tokenizer))
  return parts


def _generation(config: Config, tokenizer: Tokenizer) -> list[str]:
  parts = ['## Generation']
  if config.model.attention[2:] != 'cc':
    return [
      *parts,
      f'With attention `{config.model.attention}` the turns of the user are '
      'bidirectional. The tools below attend causally to them, so their '
      'answers are not those that it was trained to give.',
      _fill(snippets.TRANSFORMERS_GENERATION, config, tokenizer),
    ]
  for template in snippets.TRANSFORMERS_GENERATION, snippets.SERVERS:
    parts.append(_fill(template, config, tokenizer))
  return parts
