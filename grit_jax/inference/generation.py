"""Generation with a KV cache: prompts are read in chunks, then token by token.

All rows of a batch end their prompts at the same place of the cache, so that a
decoding step writes one place. A row that is shorter begins later; before its
prompt lies the cache that it goes on from, if it has one. Attention reads the
part of the cache that is in use.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grit_jax import xla_options
from grit_jax.config import ModelConfig
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.inference import sampling
from grit_jax.inference.cache import KVCache, to_dtype
from grit_jax.inference.sampling import Sampling
from grit_jax.inference.shapes import round_up
from grit_jax.models.attention import Kind, generative_kind
from grit_jax.models.decoder import Chunk, Decoder, KeysValues
from grit_jax.sharding import place, row_shards, spec

# Tokens of a prompt that are read at one time.
CHUNK = 512
LEAST_CHUNK = 16
# Places of the shortest cache.
LEAST_PLACES = 256
# Tokens that are generated before the host looks at them.
BURST = 16


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What a text is generated from.

  Attributes:
    ids: int32 [T], one token at least.
    in_instruction: bool [T], the tokens outside answers.
    sampling: How to generate.
    cache: What the prompt goes on from; None: from nothing.
  """

  ids: np.ndarray
  in_instruction: np.ndarray
  sampling: Sampling
  cache: KVCache | None = None

  @property
  def length(self) -> int:
    """Tokens of the cache and the prompt."""
    return len(self.ids) + (len(self.cache) if self.cache else 0)


@dataclasses.dataclass(frozen=True)
class Completion:
  """A generated text.

  Attributes:
    text: The text, without the string that stopped it.
    ids: Its tokens as generated, with the end of text if there is one.
    finish_reason: `stop`: by the end of text or a stop string. `length`:
      by `max_new_tokens`.
    prompt_tokens: Tokens of the prompt, without those of a cache.
  """

  text: str
  ids: tuple[int, ...]
  finish_reason: str
  prompt_tokens: int


class State(NamedTuple):
  """What a decoding step changes; B rows."""

  cache: list[KeysValues]
  token: jax.Array  # int32 [B], the newest
  made: jax.Array  # int32 [B], tokens generated
  done: jax.Array  # bool [B]
  place: jax.Array  # int32 [], where `token` goes in the cache


class Settings(NamedTuple):
  """What stays, of each row; B rows."""

  begin: jax.Array  # int32 [B], the row's first place in the cache
  keys: jax.Array  # random keys [B]
  limit: jax.Array  # int32 [B], the most tokens
  temperature: jax.Array  # float32 [B]
  top_k: jax.Array  # int32 [B]
  top_p: jax.Array  # float32 [B]
  eos: jax.Array  # int32 []


class Text:
  """A text that grows by tokens, and may be stopped by a string."""

  def __init__(self, tokenizer: Tokenizer, prompt: Prompt):
    """Starts with nothing after the prompt."""
    self.tokenizer, self.settings = tokenizer, prompt.sampling
    self.prompt = prompt.ids
    self.ids: list[int] = []
    self.text, self.shown = '', 0
    self.finish_reason = ''

  def add(self, ids: Sequence[int]) -> None:
    """Takes tokens, up to the end of text or a stop string."""
    for token in ids:
      if self.finish_reason:
        return
      self.ids.append(int(token))
      if token == self.tokenizer.eos:
        self.finish_reason = 'stop'
      elif self.settings.stop or len(self.ids) == self.settings.max_new_tokens:
        self._decode()
        if len(self.ids) == self.settings.max_new_tokens:
          self.finish_reason = self.finish_reason or 'length'
    self._decode()

  def _decode(self) -> None:
    if self.finish_reason == 'stop' and self.ids[-1] != self.tokenizer.eos:
      return
    # A model may have more ids than its tokenizer has pieces.
    known = self.tokenizer.vocab_size
    ids = [i for i in self.ids if i < known and i != self.tokenizer.eos]
    self.text = self.tokenizer.decode_after(self.prompt, ids)
    ends = [self.text.find(string) for string in self.settings.stop]
    if any(end >= 0 for end in ends):
      self.text = self.text[: min(end for end in ends if end >= 0)]
      self.finish_reason = 'stop'

  def take_new(self) -> str:
    """Returns what has been added to the text and is sure to stay.

    Not sure are the bytes of half a character, and the beginning of a string
    that would stop the text before it.
    """
    stop = len(self.text)
    if not self.finish_reason:
      stop = len(self.text.rstrip('\ufffd'))
      for string in self.settings.stop:
        for size in range(min(len(string) - 1, stop), 0, -1):
          if self.text[:stop].endswith(string[:size]):
            stop -= size
            break
    new = self.text[self.shown : stop]
    self.shown = max(self.shown, stop)
    return new


class Generation:
  """Texts that are generated side by side, a burst of tokens at a time.

  Attributes:
    prompts: What they are generated from.
    texts: The texts so far, one a prompt.
  """

  def __init__(
    self,
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    rows: int = 0,
    places: int = 0,
  ):
    """Reads the prompts, and chooses each text's first token.

    Args:
      model: The decoder.
      tokenizer: Its tokenizer.
      prompts: They share a cache as long as the longest of them needs.
      rows: Of the batch at least, and `places` of the cache: batches of one
        size share their programs.
      places: See `count_places`.
    """
    self.prompts = prompts
    self.texts = [Text(tokenizer, prompt) for prompt in prompts]
    self._model = model
    self._batch = _Batch(model.config, prompts, tokenizer.eos, rows, places)
    # The rows that fill the batch up have ended before they begin.
    self._ended = np.arange(self._batch.rows) >= len(prompts)
    self._state, self._settings = self._batch.start(model)
    self._take(np.asarray(self._state.token)[:, None])

  @property
  def done(self) -> bool:
    """Whether all texts have ended."""
    return bool(self._ended.all())

  def has_ended(self, row: int) -> bool:
    """Says whether a prompt's text has ended, by itself or by `drop`."""
    return bool(self._ended[row])

  def step(self, tokens: int) -> None:
    """Generates up to `tokens` more of each text, `BURST` at most."""
    # A copy: the device may read the host's array after this has changed it.
    done = place(self._batch.mesh, self._ended.copy(), None)
    state = self._state._replace(done=done)
    self._state, new = _decode(
      self._model, state, self._settings, np.int32(tokens)
    )
    self._take(np.asarray(new))

  def drop(self, row: int) -> None:
    """Ends a prompt's text where it is: the others do not wait for it."""
    self._ended[row] = True

  def complete(self, row: int) -> Completion:
    """Returns a prompt's text, which has ended."""
    text = self.texts[row]
    return Completion(
      text.text,
      tuple(text.ids),
      text.finish_reason,
      len(self.prompts[row].ids),
    )

  def _take(self, tokens: np.ndarray) -> None:
    for row, text in enumerate(self.texts):
      if not self._ended[row]:
        new = tokens[row]
        text.add(new[new >= 0])
        self._ended[row] = bool(text.finish_reason)


def generate(
  model: Decoder,
  tokenizer: Tokenizer,
  prompts: Sequence[Prompt],
  callback: Callable[[int, str], None] | None = None,
) -> list[Completion]:
  """Generates from a batch of prompts; under `jax.set_mesh`.

  Args:
    model: The decoder.
    tokenizer: Its tokenizer.
    prompts: They share a cache as long as the longest of them needs.
    callback: Called with a prompt's number and the next piece of its text as
      soon as that is there.

  Returns:
    The texts, in order.
  """
  generation = Generation(model, tokenizer, prompts)
  while True:
    if callback is not None:
      for row, text in enumerate(generation.texts):
        if piece := text.take_new():
          callback(row, piece)
    if generation.done:
      break
    generation.step(BURST if callback is None else 1)
  return [generation.complete(row) for row in range(len(prompts))]


class _Batch:
  """Prompts side by side, their ends at one place of the cache."""

  def __init__(
    self,
    config: ModelConfig,
    prompts: Sequence[Prompt],
    eos: int,
    rows: int,
    places: int,
  ):
    self.config, self.prompts, self.eos = config, prompts, eos
    self.mesh = jax.sharding.get_mesh()
    shards = row_shards(self.mesh)
    self.rows = shards * round_up(-(-max(len(prompts), rows) // shards))
    self.longest = max(len(prompt.ids) for prompt in prompts)
    self.whole = _reads_whole(config)
    self.chunks = split_prompt(self.longest, self.whole)
    self.padded = sum(self.chunks)
    self.end = max(self.padded, *(prompt.length for prompt in prompts))
    new = max(prompt.sampling.max_new_tokens for prompt in prompts)
    self.places = round_places(max(self.end + new, places))

  def start(self, model: Decoder) -> tuple[State, Settings]:
    """Reads the prompts, and chooses each row's first token."""
    cache = self._make_cache()
    for chunk in self._chunks():
      hidden, cache = _read(model, cache, chunk)
    settings = self._settings()
    token = _choose_first(model, hidden, settings)
    count = np.ones(self.rows, np.int32)
    put = partial(place, self.mesh)
    return State(
      cache,
      token,
      put(count, None),
      put(np.zeros(self.rows, bool), None),
      put(np.array(self.end, np.int32)),
    ), settings

  def _make_cache(self) -> list[KeysValues]:
    """Returns the prompts' caches, each ending where its prompt begins."""
    model = self.config
    shape = (self.rows, model.num_kv_heads, self.places, model.head_dim)
    axes = ('rows', 'kv_heads', 'seq', 'head_dim')
    if not any(prompt.cache for prompt in self.prompts):
      return _make_empty(model.num_layers, shape, model.dtype)
    layers = []
    for layer in range(model.num_layers):
      pair = []
      for part in ('keys', 'values'):
        array = np.zeros(shape, to_dtype(model.dtype))
        for row, prompt in enumerate(self.prompts):
          if prompt.cache:
            begin = self.end - prompt.length
            stop = begin + len(prompt.cache)
            array[row, :, begin:stop] = getattr(prompt.cache, part)[layer]
        pair.append(place(self.mesh, array, *axes))
      keys, values = pair
      layers.append((keys, values))
    return layers

  def _chunks(self) -> list[Chunk]:
    """Returns the prompts in chunks."""
    shape = (self.rows, self.padded)
    tokens, positions, last = np.zeros((3, *shape), np.int32)
    real = np.zeros(shape, bool)
    first = np.full(shape, self.places, np.int32)
    places = np.arange(self.end - self.padded, self.end)
    last -= 1
    for row, prompt in enumerate(self.prompts):
      own = np.s_[row, self.padded - len(prompt.ids) :]
      tokens[own] = prompt.ids
      real[own] = True
      begin = self.end - prompt.length
      positions[own] = (places - begin)[own[1]]
      first[own] = begin
      last[own] = self._last_seen(prompt, places[own[1]])
    if self.config.sliding_window:
      window = self.config.sliding_window
      first = np.maximum(first, places - window + 1)
      last = np.minimum(last, places + window - 1)
    rows = {
      'tokens': tokens, 'positions': positions, 'real': real,
      'first': first, 'last': last,
    }  # fmt: skip
    put = partial(place, self.mesh)
    chunks, start = [], 0
    for size in self.chunks:
      part = np.s_[:, start : start + size]
      chunks.append(
        Chunk(
          **{name: put(x[part], 'rows', 'seq') for name, x in rows.items()},
          start=put(np.array(places[start], np.int32)),
        )
      )
      start += size
    return chunks

  def _last_seen(self, prompt: Prompt, places: np.ndarray) -> np.ndarray:
    """Returns the last place that each of a prompt's tokens sees."""
    if not self.whole:
      return places
    # The kinds there are let an instruction see the whole of its stretch.
    stops = np.flatnonzero(~prompt.in_instruction)
    ends = np.append(stops, len(places))[
      np.searchsorted(stops, np.arange(len(places)))
    ]
    ends = np.where(prompt.in_instruction, ends - 1, np.arange(len(places)))
    return places[ends]

  def _settings(self) -> Settings:
    put = partial(place, self.mesh)
    rows = [prompt.sampling for prompt in self.prompts]
    rows += [Sampling()] * (self.rows - len(rows))
    begin = np.full(self.rows, self.end, np.int32)
    begin[: len(self.prompts)] -= [prompt.length for prompt in self.prompts]

    def column(name: str, dtype: type) -> jax.Array:
      return put(np.array([getattr(row, name) for row in rows], dtype), None)

    return Settings(
      put(begin, None),
      _make_keys(column('seed', np.uint32)),
      column('max_new_tokens', np.int32),
      column('temperature', np.float32),
      column('top_k', np.int32),
      column('top_p', np.float32),
      put(np.array(self.eos, np.int32)),
    )


def split_prompt(tokens: int, whole: bool = False) -> list[int]:
  """Returns the sizes of the chunks that a prompt is read in: few shapes.

  The first is the shortest: a prompt of 513 tokens is not read as 1024.

  Args:
    tokens: Of the prompt.
    whole: Whether it has to be one chunk.
  """
  full, rest = (0, tokens) if whole else divmod(tokens, CHUNK)
  first = [max(LEAST_CHUNK, round_up(rest))] if rest else []
  return first + [CHUNK] * full


def _reads_whole(config: ModelConfig) -> bool:
  """Whether a prompt has to be one chunk: its tokens see later ones."""
  return generative_kind(config.attention) is not Kind.CAUSAL


def count_places(config: ModelConfig, prompt: int, new: int) -> int:
  """Returns the places that are enough for shorter prompts and answers too.

  Args:
    config: Of the model.
    prompt: Tokens of the prompt.
    new: Tokens of the answer, which ends at the model's last position.
  """
  padded = sum(split_prompt(prompt, _reads_whole(config)))
  return round_places(padded + min(new, config.max_positions))


def round_places(count: int) -> int:
  """Returns the places of a cache that holds `count`: few shapes."""
  size = round_up(count, LEAST_PLACES)
  # Of a long cache at most a quarter is not used.
  return size * 3 // 4 if count <= size * 3 // 4 >= LEAST_PLACES else size


@partial(jax.jit, static_argnums=(0, 1, 2))
def _make_empty(
  layers: int, shape: tuple[int, ...], dtype: str
) -> list[KeysValues]:
  sharding = spec('rows', 'kv_heads', 'seq', 'head_dim')

  def zeros() -> jax.Array:
    return jnp.zeros(shape, dtype, out_sharding=sharding)

  return [(zeros(), zeros()) for _ in range(layers)]


@jax.jit
def _make_keys(seeds: jax.Array) -> jax.Array:
  return jax.vmap(jax.random.key)(seeds)


@partial(xla_options.jit, donate_argnums=1)
def _read(
  model: Decoder, cache: list[KeysValues], chunk: Chunk
) -> tuple[jax.Array, list[KeysValues]]:
  """Reads a chunk of the prompts; returns the last state, [B, 1, D]."""
  hidden, cache = model.extend(chunk, cache)
  return hidden[:, -1:], cache


@xla_options.jit
def _choose_first(
  model: Decoder, hidden: jax.Array, settings: Settings
) -> jax.Array:
  return _choose(model, hidden, settings, jnp.zeros_like(settings.limit))


def _choose(
  model: Decoder, hidden: jax.Array, settings: Settings, count: jax.Array
) -> jax.Array:
  """Chooses each row's next token, int32 [B], from its state, [B, 1, D]."""
  logits = model.logits(hidden, model.gather_head())[:, 0]
  # Each device chooses for all rows: a draw is the same on every mesh.
  logits = jax.sharding.reshard(logits, jax.P())
  return sampling.choose(
    logits, settings.keys, count, settings.temperature, settings.top_k,
    settings.top_p,
  )  # fmt: skip


@partial(xla_options.jit, donate_argnums=1)
def _decode(
  model: Decoder,
  state: State,
  settings: Settings,
  steps: jax.Array,
) -> tuple[State, jax.Array]:
  """Generates up to `steps` tokens a row, `BURST` at most.

  Returns:
    The state, and the tokens, int32 [B, BURST], -1 where there is none.
  """
  window = model.config.sliding_window
  tokens = jnp.full((state.token.shape[0], BURST), -1, jnp.int32)

  def step(carry: tuple) -> tuple:
    state, tokens, number = carry
    begin = settings.begin
    if window:
      begin = jnp.maximum(begin, state.place - window + 1)
    rows = {
      'tokens': state.token,
      'positions': state.place - settings.begin,
      'real': ~state.done,
      'first': begin,
      # A row that is done reads nothing.
      'last': jnp.where(state.done, -1, state.place),
    }
    chunk = Chunk(
      **{
        name: jax.sharding.reshard(x[:, None], spec('rows', 'seq'))
        for name, x in rows.items()
      },
      start=state.place,
    )
    hidden, cache = model.extend(chunk, state.cache)
    token = _choose(model, hidden, settings, state.made)
    tokens = tokens.at[:, number].set(jnp.where(state.done, -1, token))
    made = state.made + ~state.done
    done = state.done | (token == settings.eos) | (made >= settings.limit)
    state = State(cache, token, made, done, state.place + 1)
    return state, tokens, number + 1

  def goes_on(carry: tuple) -> jax.Array:
    state, _, number = carry
    return (number < steps) & ~jnp.all(state.done)

  state, tokens, _ = jax.lax.while_loop(
    goes_on, step, (state, tokens, jnp.zeros((), jnp.int32))
  )
  return state, tokens
