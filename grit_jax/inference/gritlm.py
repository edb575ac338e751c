"""One model that embeds and generates: load it, `encode`, `generate`."""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from grit_jax import sharding
from grit_jax.config import (
  ATTENTION_MODES,
  POOLINGS,
  Config,
  EvaluationConfig,
  MeshConfig,
  ModelConfig,
)
from grit_jax.data import formats
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.errors import ConfigError, UserError
from grit_jax.inference.cache import KVCache
from grit_jax.inference.encoding import Encoder, Options, Request
from grit_jax.inference.generation import Completion, Prompt, generate
from grit_jax.inference.sampling import Sampling
from grit_jax.inference.scoring import (
  Candidate,
  Score,
  Scorer,
  encode_candidate,
)
from grit_jax.initial import load_unstacked, open_initial
from grit_jax.models.decoder import Decoder
from grit_jax.models.quantization import KINDS

# A message: {'role': 'user' or 'assistant', 'content': a text}.
Message = Mapping[str, str]
# A text that is continued as it is, or a conversation that is answered.
PromptText = str | Sequence[Message]

# Documents: texts, or mappings with `text` and perhaps `title`.
Corpus = str | Mapping[str, str] | Sequence[str | Mapping[str, str]]

# Texts from which on a bar shows the progress, unless it is asked for.
LONG_WORK = 256
# Tokens that `score` computes at one time.
CALL_TOKENS = 2**14


class GritLM:
  """A GRIT model for inference, after the PyTorch package's class.

  Every method may be called from several threads; one at a time works.

  Attributes:
    config: Its configuration; `config.model` is the architecture.
    tokenizer: Its tokenizer.
    mesh: The devices that it is on.
  """

  def __init__(
    self,
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
  ):
    """Takes a model that is on the mesh; see `load`.

    Args:
      config: For the model and `attention_kernel`.
      model: As `Decoder.unstack` gives it.
      tokenizer: Its tokenizer.
      mesh: Where it is.
    """
    self.config, self.model, self.tokenizer = config, model, tokenizer
    self.mesh = mesh
    self._encoder = Encoder(config, model, tokenizer)
    self._scorer = Scorer(config, model)
    self._lock = threading.Lock()
    # The folder of a model that was saved without a head.
    self._headless = ''

  @classmethod
  def load(
    cls,
    path: epath.PathLike,
    *,
    mesh: MeshConfig | None = None,
    dtype: str = '',
    quantization: str = '',
    attention: str = '',
    pooling: str = '',
  ) -> 'GritLM':
    """Loads a model.

    Args:
      path: A workdir (its newest checkpoint), a checkpoint, or a Hugging Face
        folder.
      mesh: How to split it over all devices; None: it is on the first one. To
        split rows takes `data` or `fsdp`, heads `tensor`.
      dtype: Of weights and activations, `float32` or `bfloat16`; empty: that
        the model was trained in, or a foreign folder's weights are stored in.
      quantization: `int8` or `nf4` for the layers' weights; empty: none.
      attention: As `bbcc`; empty: the model's own, and `bbcc` for a Hugging
        Face folder, which does not say.
      pooling: As `mean`; empty: the model's own, and `mean` for such a folder.

    Raises:
      UserError: There is no such model, or it is damaged.
      ConfigError: An argument is not one of its choices.
      UserError: The model does not divide over the mesh.
    """
    initial = open_initial(path)
    chosen = _choose_model(
      initial.model, dtype=dtype, attention=attention, pooling=pooling
    )
    if quantization not in ('', *KINDS):
      raise ConfigError(
        f'quantization={quantization!r} is not one of {", ".join(KINDS)}.'
      )
    config = Config(
      model=chosen,
      mesh=mesh or MeshConfig(),
      evaluation=EvaluationConfig(enabled=False),
    )
    devices = None if mesh else jax.devices()[:1]
    grid = sharding.make_mesh(config.mesh, devices)
    sharding.validate(config, grid)
    with jax.set_mesh(grid):
      model = load_unstacked(config, initial, quantization)
    loaded = cls(config, model, initial.tokenizer, grid)
    loaded._headless = '' if initial.has_head else initial.where
    return loaded

  @overload
  def encode(
    self,
    sentences: str | Sequence[str],
    instruction: str = '',
    max_length: int = 512,
    batch_size: int = 32,
    get_cache: Literal[False] = False,
    *,
    add_special_tokens: bool = True,
    normalized: bool = True,
    show_progress_bar: bool | None = None,
    few_shapes: bool = False,
  ) -> np.ndarray: ...

  @overload
  def encode(
    self,
    sentences: str | Sequence[str],
    *,
    get_cache: Literal[True],
    **options: Unpack[Options],
  ) -> tuple[np.ndarray, list[KVCache]]: ...

  def encode(
    self,
    sentences: str | Sequence[str],
    instruction: str = '',
    max_length: int = 512,
    batch_size: int = 32,
    get_cache: bool = False,
    *,
    add_special_tokens: bool = True,
    normalized: bool = True,
    show_progress_bar: bool | None = None,
    few_shapes: bool = False,
  ) -> np.ndarray | tuple[np.ndarray, list[KVCache]]:
    r"""Embeds texts, of any mix of lengths.

    Args:
      sentences: One text or several.
      instruction: What the embedding is for, such as `Given a question,
        retrieve passages that answer it`; empty for documents. One that ends
        in `<|embed|>\n` is taken as already formatted.
      max_length: Tokens that are kept of a text, with its instruction.
      batch_size: The memory is that of so many texts of `max_length` tokens.
      get_cache: Whether to return the texts' KV caches too; see `generate`.
      add_special_tokens: Whether a text begins with BOS.
      normalized: Whether embeddings have length 1.
      show_progress_bar: None: from 256 texts on.
      few_shapes: Whether calls have one of few shapes, with more padding: for
        many small calls, of which each shape compiles a program.

    Returns:
      float32 [texts, D] in the order of the texts, or [D] of one text. An
      empty text is 0. With `get_cache` also a list of the caches.

    Raises:
      FormatError: The instruction leaves no room for a text.
      TypeError, UserError: A text is no string, or no valid Unicode.
    """
    texts = [sentences] if isinstance(sentences, str) else list(sentences)
    for number, text in enumerate(texts):
      _check_text(text, f'sentences[{number}]')
    if max_length < 1 or batch_size < 1:
      raise UserError(
        f'max_length={max_length} and batch_size={batch_size} must be 1 or '
        'greater.'
      )
    request = Request(
      self._format_instruction(instruction, add_special_tokens),
      min(max_length, self.config.model.max_positions),
      batch_size,
      normalized,
      get_cache,
      few_shapes,
    )
    if show_progress_bar is None:
      show_progress_bar = len(texts) >= LONG_WORK
    with self._lock, jax.set_mesh(self.mesh):
      found, caches = self._encoder.encode(texts, request, show_progress_bar)
    if isinstance(sentences, str):
      found = found[0]
    return (found, caches) if get_cache else found

  def count_tokens(
    self, sentences: Sequence[str], instruction: str = ''
  ) -> list[int]:
    """Counts the tokens that `encode` reads of texts when it cuts nothing.

    Args:
      sentences: The texts.
      instruction: As of `encode`; its tokens count.

    Returns:
      A number a text; 0 of an empty one.
    """
    prefix = self._format_instruction(instruction, True)
    encoded = self.tokenizer.encode_parts_batch(
      [(prefix, s) for s in sentences]
    )
    return [len(ids) if part.any() else 0 for ids, part in encoded]

  @overload
  def encode_queries(
    self, queries: str | Sequence[str], **options: Unpack[Options]
  ) -> np.ndarray: ...

  @overload
  def encode_queries(
    self,
    queries: str | Sequence[str],
    *,
    get_cache: Literal[True],
    **options: Unpack[Options],
  ) -> tuple[np.ndarray, list[KVCache]]: ...

  def encode_queries(
    self, queries: str | Sequence[str], **arguments: Any
  ) -> np.ndarray | tuple[np.ndarray, list[KVCache]]:
    """Embeds queries: `encode`, whose arguments it takes."""
    return self.encode(queries, **arguments)

  @overload
  def encode_corpus(
    self, corpus: Corpus, **options: Unpack[Options]
  ) -> np.ndarray: ...

  @overload
  def encode_corpus(
    self,
    corpus: Corpus,
    *,
    get_cache: Literal[True],
    **options: Unpack[Options],
  ) -> tuple[np.ndarray, list[KVCache]]: ...

  def encode_corpus(
    self, corpus: Corpus, **arguments: Any
  ) -> np.ndarray | tuple[np.ndarray, list[KVCache]]:
    """Embeds documents: `encode`, whose arguments it takes.

    Args:
      corpus: Texts, or mappings with `text` and perhaps `title`, which goes
        before the text with a blank.
      **arguments: Those of `encode`.
    """
    if isinstance(corpus, str):
      return self.encode(corpus, **arguments)
    documents = [corpus] if isinstance(corpus, Mapping) else corpus
    return self.encode([join_title(d) for d in documents], **arguments)

  def generate(
    self,
    prompts: PromptText | Sequence[PromptText],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    cache: KVCache | Sequence[KVCache] | None = None,
    batch_size: int = 16,
    callback: Callable[[int, str], None] | None = None,
  ) -> str | list[str]:
    """Continues texts, or answers conversations.

    Args:
      prompts: One or several. A string is continued as it is, after BOS. A
        list of messages, `{'role': 'user', 'content': ...}`, is put into the
        chat format and answered.
      max_new_tokens: See `Sampling`, as the next ones.
      temperature: 0: greedy.
      top_k: 0: all.
      top_p: 1: all.
      seed: The texts are drawn with this and the next ones.
      stop: One string or several that end a text.
      cache: What `encode(..., get_cache=True)` gave, one a prompt: the prompt,
        a string, goes on from it, without BOS.
      batch_size: Prompts that are generated from at one time.
      callback: Called with a prompt's number and each next piece of its text.

    Returns:
      The new text, or a list of them.

    Raises:
      UserError: An argument cannot be, or a conversation is not one.
    """
    one = isinstance(prompts, str) or _is_conversation(prompts)
    all_prompts: list[Any] = [prompts] if one else list(prompts)
    caches = [cache] if isinstance(cache, KVCache) else cache
    if caches is not None and len(caches) != len(all_prompts):
      raise UserError(
        f'There are {len(all_prompts)} prompts and {len(caches)} caches.'
      )
    settings = Sampling(
      max_new_tokens, temperature, top_k, top_p, seed,
      (stop,) if isinstance(stop, str) else tuple(stop),
    )  # fmt: skip
    encoded = [
      self.encode_prompt(
        prompt,
        dataclasses.replace(settings, seed=(seed + i) % 2**32),
        caches[i] if caches is not None else None,
      )
      for i, prompt in enumerate(all_prompts)
    ]
    found = [c.text for c in self.complete(encoded, batch_size, callback)]
    return found[0] if one else found

  def encode_prompt(
    self,
    prompt: PromptText,
    settings: Sampling = Sampling(),  # noqa: B008 - it is frozen
    cache: KVCache | None = None,
  ) -> Prompt:
    """Tokenizes what `complete` takes; see `generate`.

    Raises:
      UserError: The prompt or a setting cannot be, or the prompt with what is
        to be generated is longer than the model's positions.
    """
    settings.validate()
    self._check_head()
    if cache is not None and not isinstance(prompt, str):
      raise UserError('A cache is gone on from with a string, not messages.')
    parts = self._prompt_parts(prompt, bos=cache is None)
    ids, part = self.tokenizer.encode_parts(parts)
    if not len(ids):
      raise UserError('The prompt has no tokens.')
    encoded = Prompt(ids, part % 2 == 0, settings, cache)
    positions = self.config.model.max_positions
    if encoded.length + settings.max_new_tokens > positions:
      raise UserError(
        f'The prompt has {encoded.length} tokens, which with max_new_tokens='
        f'{settings.max_new_tokens} is more than the {positions} positions of '
        'the model.'
      )
    return encoded

  def complete(
    self,
    prompts: Sequence[Prompt],
    batch_size: int = 16,
    callback: Callable[[int, str], None] | None = None,
  ) -> list[Completion]:
    """Generates from tokenized prompts, each with settings of its own.

    Args:
      prompts: What `encode_prompt` gives.
      batch_size: See `generate`, as the next one.
      callback: Pieces of the texts.

    Returns:
      The texts with their tokens and the reasons of their ends, in order.

    Raises:
      UserError: There would be no text in a batch.
    """
    if batch_size < 1:
      raise UserError(f'batch_size={batch_size} must be 1 or greater.')
    # Prompts of like lengths go together: a batch is as long as its longest.
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].length)
    found: dict[int, Completion] = {}
    with tqdm(
      total=len(prompts),
      desc='Generating',
      unit='text',
      disable=len(prompts) < LONG_WORK,
    ) as bar:
      for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        show = callback and partial(_show_piece, callback, members)
        with self._lock, jax.set_mesh(self.mesh):
          texts = generate(
            self.model,
            self.tokenizer,
            [prompts[i] for i in members],
            show,
          )
        found.update(zip(members, texts, strict=True))
        bar.update(len(members))
    return [found[i] for i in range(len(prompts))]

  def score(
    self,
    prompts: PromptText | Sequence[PromptText],
    continuations: str | Sequence[str],
    *,
    call_tokens: int = CALL_TOKENS,
  ) -> Score | list[Score]:
    """Says how likely continuations are.

    Among candidates it chooses the best, for instance the query that a document
    is likeliest to be for.

    Args:
      prompts: One or several, as `generate` takes them.
      continuations: One or several, taken as they are; a blank or the end of
        text that belongs to them must be there. As many as the prompts, or one
        of either for all of the others.
      call_tokens: Tokens that are computed at one time; a row at least.

    Returns:
      The score, or a list of them if prompts or continuations are several.

    Raises:
      UserError: A continuation adds no token, or is with its prompt longer
        than the model's positions; or a conversation is not one.
    """
    one_prompt = isinstance(prompts, str) or _is_conversation(prompts)
    one = isinstance(continuations, str)
    all_prompts: list[Any] = [prompts] if one_prompt else list(prompts)
    texts: list[Any] = [continuations] if one else list(continuations)
    if one_prompt:
      all_prompts *= len(texts)
    if one:
      texts *= len(all_prompts)
    if len(all_prompts) != len(texts):
      raise UserError(
        f'There are {len(all_prompts)} prompts and {len(texts)} continuations.'
      )
    candidates = [
      self._encode_candidate(prompt, text)
      for prompt, text in zip(all_prompts, texts, strict=True)
    ]
    found = self.score_tokens(candidates, call_tokens=call_tokens)
    return found[0] if one_prompt and one else found

  def score_tokens(
    self,
    candidates: Sequence[Candidate],
    callback: Callable[[int, Score], None] | None = None,
    *,
    call_tokens: int = CALL_TOKENS,
  ) -> list[Score]:
    """Scores tokenized continuations; see `score`.

    Args:
      candidates: The continuations with their prompts.
      callback: Called with a candidate's number and its score as soon as that
        is there.
      call_tokens: Tokens that are computed at one time; a row at least.

    Returns:
      The scores, in order.
    """
    self._check_head()
    found: dict[int, Score] = {}
    with (
      self._lock,
      jax.set_mesh(self.mesh),
      tqdm(
        total=len(candidates),
        desc='Scoring',
        unit='text',
        disable=len(candidates) < LONG_WORK,
      ) as bar,
    ):
      for number, score in self._scorer.score(candidates, call_tokens):
        found[number] = score
        if callback is not None:
          callback(number, score)
        bar.update()
    return [found[i] for i in range(len(candidates))]

  def _check_head(self) -> None:
    if self._headless:
      raise UserError(
        f'{self._headless} has no head (lm_head.weight): it embeds, and cannot '
        'generate.'
      )

  def _encode_candidate(self, prompt: PromptText, text: str) -> Candidate:
    _check_text(text, 'a continuation')
    candidate = encode_candidate(
      self.tokenizer, self._prompt_parts(prompt), text
    )
    positions = self.config.model.max_positions
    if len(candidate.ids) - 1 > positions:
      raise UserError(
        f'The prompt has {len(candidate.ids)} tokens with its continuation, '
        f'more than the {positions} positions of the model.'
      )
    return candidate

  def _prompt_parts(self, prompt: PromptText, bos: bool = True) -> list[str]:
    """Returns a prompt in parts, in turn instruction and answer."""
    if not isinstance(prompt, str):
      return self._format_messages(prompt)
    _check_text(prompt, 'the prompt')
    piece = self.tokenizer.bos_piece
    return [piece + prompt if bos and not prompt.startswith(piece) else prompt]

  def _format_instruction(self, instruction: str, bos: bool) -> str:
    _check_text(instruction, 'the instruction')
    piece = self.tokenizer.bos_piece
    if instruction.endswith(formats.EMBED):
      prefix = instruction
      if not prefix.startswith(piece):
        prefix = piece + prefix
    else:
      prefix = formats.format_embedding_prefix(instruction, self.tokenizer)
    return prefix if bos else prefix.removeprefix(piece)

  def _format_messages(self, messages: Sequence[Message]) -> list[str]:
    """Returns a prompt in parts, in turn instruction and answer."""
    turns = []
    for number, message in enumerate(messages):
      role = ('user', 'assistant')[number % 2]
      if message.get('role') != role:
        raise UserError(
          f'messages[{number}] is of the role {message.get("role")!r}, not '
          f'{role!r}: user and assistant alternate, and the format has no '
          'other.'
        )
      _check_text(message.get('content'), f"messages[{number}]['content']")
      turns.append(message['content'])
    if len(turns) % 2 == 0:
      raise UserError(f"The last of {len(turns)} messages must be the user's.")
    exchanges = formats.format_turns([*turns, ''], self.tokenizer)
    parts = [part for exchange in exchanges for part in exchange]
    return parts[:-1]


def _show_piece(
  callback: Callable[[int, str], None],
  numbers: Sequence[int],
  row: int,
  piece: str,
) -> None:
  callback(numbers[row], piece)


def join_title(document: str | Mapping[str, str | None]) -> str:
  """Returns a document's text, after its title if it has one.

  Args:
    document: A text, or a mapping with `text` and perhaps `title`; a title that
      is None or blank is none.

  Raises:
    TypeError: The text or the title is no string.
    UserError: There is no text.
  """
  if isinstance(document, str):
    return document
  if not isinstance(document, Mapping):
    raise TypeError(
      f'A document is a string or a mapping, not {type(document).__name__}.'
    )
  if 'text' not in document:
    raise UserError(f"A document has no 'text': {sorted(document)}.")
  text, title = document['text'], document.get('title')
  text = _check_text(text, "A document's text")
  if title is None:
    return text
  title = _check_text(title, "A document's title")
  return f'{title} {text}' if title.strip() else text


def _choose_model(model: ModelConfig, **choices: str) -> ModelConfig:
  """Returns the model's config with what the caller chose in place of its own.

  Weights are in the dtype that is computed in: there is nothing to train.
  """
  options = {
    'dtype': ('float32', 'bfloat16'),
    'attention': ATTENTION_MODES,
    'pooling': POOLINGS,
  }
  for name, value in choices.items():
    if value and value not in options[name]:
      raise ConfigError(
        f'{name}={value!r} is not one of {", ".join(options[name])}.'
      )
  chosen: dict[str, Any] = {k: value for k, value in choices.items() if value}
  model = dataclasses.replace(model, **chosen)
  return dataclasses.replace(model, param_dtype=model.dtype)


def _check_text(text: object, where: str) -> str:
  if not isinstance(text, str):
    raise TypeError(f'{where} is of type {type(text).__name__}, not a string.')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{where} is no valid Unicode: {error}') from error
  return text


def _is_conversation(prompts: Sequence) -> bool:
  return bool(prompts) and isinstance(prompts[0], Mapping)
