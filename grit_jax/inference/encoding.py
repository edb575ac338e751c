"""Texts to embeddings, in packed rows of few shapes."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypedDict

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from grit_jax import objective, pooling, xla_options
from grit_jax.batch import Rows
from grit_jax.config import Config
from grit_jax.data.filling import Filler, RowShards, fill_texts
from grit_jax.data.formats import EmbeddingText, mark_embedding
from grit_jax.data.packing import Packing, pack
from grit_jax.data.pipeline import place_batch
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.inference.cache import KVCache
from grit_jax.inference.shapes import round_rows, round_up
from grit_jax.models.attention import embedding_kind
from grit_jax.models.decoder import Decoder
from grit_jax.sharding import row_shards

# Tokens of the shortest rows. Shorter texts share one; attention skips what
# lies between them.
LEAST_ROW = 256
# Tokens of the shortest row of a call whose texts all fit into one: a question
# is not kept waiting for 256 tokens.
LEAST_SINGLE_ROW = 16
# Texts that fit rows of this length do not go into longer ones, in which a TPU
# computes attention across texts too.
USUAL_ROW = 2048
# A row has a text for so many of its tokens at most: the shortest text is a
# begin of text and `<|embed|>\n`.
TOKENS_A_TEXT = 8
# Texts that are tokenized, sorted and packed together.
WINDOW = 2**15
# Bytes of the caches that one call leaves on the device.
CACHE_BYTES = 2**30
# Calls that are under way while results are read.
AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Request:
  """What `Encoder.encode` does with every text.

  Attributes:
    prefix: What stands before it, with BOS; not pooled.
    max_length: Tokens to keep, those of the prefix included.
    batch_size: A call has as many tokens as this many texts of `max_length`.
    normalized: Whether embeddings have length 1.
    get_cache: Whether KV caches are kept.
    few_shapes: Whether rows are padded to one of few lengths, for a server that
      must not compile a program for each mix of texts.
  """

  prefix: str
  max_length: int
  batch_size: int
  normalized: bool = True
  get_cache: bool = False
  few_shapes: bool = False


class Options(TypedDict, total=False):
  """What `GritLM.encode` takes besides texts and `get_cache`."""

  instruction: str
  max_length: int
  batch_size: int
  add_special_tokens: bool
  normalized: bool
  show_progress_bar: bool | None


class Encoder:
  """Encodes texts with one model; under `jax.set_mesh`."""

  def __init__(self, config: Config, model: Decoder, tokenizer: Tokenizer):
    """Keeps what it encodes with."""
    self.config, self.model, self.tokenizer = config, model, tokenizer

  def encode(
    self, texts: Sequence[str], request: Request, progress: bool
  ) -> tuple[np.ndarray, list[KVCache]]:
    """Encodes texts of any mix of lengths.

    Args:
      texts: The texts.
      request: What to do with each.
      progress: Whether a bar shows how far it is.

    Returns:
      float32 [texts, D], in the order of the texts; a text without tokens is
      0. And the caches; none if they are not asked for.

    Raises:
      FormatError: The prefix leaves no room for a text.
    """
    model = self.model.config
    width = model.projection_dim or model.embed_dim
    found = np.zeros((len(texts), width), np.float32)
    caches: dict[int, KVCache] = {}
    cut = empty = 0
    with tqdm(
      total=len(texts), desc='Encoding', unit='text', disable=not progress
    ) as bar:
      for start in range(0, len(texts), WINDOW):
        tokens = self._tokenize(texts[start : start + WINDOW], request)
        cut += sum(text.cut > 0 for text in tokens)
        empty += sum(
          text.instruction_length == len(text.ids) for text in tokens
        )
        for members, rows, keys_values in self._run(tokens, request):
          found[start + members] = rows
          caches.update(zip(start + members, keys_values, strict=False))
          bar.update(len(members))
    if cut:
      logging.warning(
        '%d of %d texts are longer than max_length=%d tokens, and were cut.',
        cut, len(texts), request.max_length,
      )  # fmt: skip
    if empty:
      logging.warning(
        '%d of %d texts are empty; their embeddings are 0.', empty, len(texts)
      )
    return found, [caches[i] for i in range(len(caches))]

  def _tokenize(
    self, texts: Sequence[str], request: Request
  ) -> list[EmbeddingText]:
    encoded = self.tokenizer.encode_parts_batch(
      [(request.prefix, text) for text in texts]
    )
    tokens = []
    for ids, part in encoded:
      if part.any():
        tokens.append(mark_embedding(ids, part, request.max_length))
      else:
        ids = ids[: request.max_length]
        tokens.append(EmbeddingText(ids, len(ids)))
    return tokens

  def _run(
    self, texts: Sequence[EmbeddingText], request: Request
  ) -> Iterator[tuple[np.ndarray, list[np.ndarray], list[KVCache]]]:
    """Encodes tokens; yields which texts, their embeddings and any caches."""
    pending: collections.deque = collections.deque()
    for members, packing, rows, segments in self._pack(texts, request):
      result = _embed(
        self.config, self.model, place_batch(jax.sharding.get_mesh(), rows),
        segments, request.normalized, request.get_cache,
      )  # fmt: skip
      pending.append((members, packing, result))
      if len(pending) > AHEAD - request.get_cache:
        yield self._take(texts, *pending.popleft())
    while pending:
      yield self._take(texts, *pending.popleft())

  def _take(
    self,
    texts: Sequence[EmbeddingText],
    members: np.ndarray,
    packing: Packing,
    result: tuple,
  ) -> tuple[np.ndarray, list[np.ndarray], list[KVCache]]:
    """Reads the texts' embeddings and caches out of the rows of a call."""
    embeddings, layers = jax.device_get(result)
    found: list[np.ndarray] = []
    caches: list[KVCache] = []
    for text, row, segment, offset in zip(
      members, packing.rows, packing.segments, packing.offsets, strict=True
    ):
      found.append(embeddings[row, segment - 1])
      if layers:
        place = np.s_[row, offset : offset + len(texts[text].ids)]
        caches.append(
          KVCache(
            *(
              np.stack([layer[part][place].swapaxes(0, 1) for layer in layers])
              for part in (0, 1)
            )
          )
        )
    return members, found, caches

  def _pack(
    self, texts: Sequence[EmbeddingText], request: Request
  ) -> Iterator[tuple[np.ndarray, Packing, Rows, int]]:
    """Packs texts into calls; yields the texts of one, and its rows."""
    shards = row_shards(jax.sharding.get_mesh())
    lengths = np.array([len(text.ids) for text in texts])
    for group in (
      np.flatnonzero(lengths > USUAL_ROW),
      np.flatnonzero(lengths <= USUAL_ROW),
    ):
      if not len(group):
        continue
      total, longest = int(lengths[group].sum()), int(lengths[group].max())
      if total <= LEAST_ROW:
        length = round_up(total, LEAST_SINGLE_ROW)
      elif request.few_shapes:
        # All in one row, or in rows as long as they may be.
        row = min(USUAL_ROW, request.batch_size * request.max_length)
        length = round_up(max(longest, min(total, row)), LEAST_ROW)
      else:
        length = round_length(longest)
      segments = length // TOKENS_A_TEXT
      packing = pack(lengths[group], length, segments)
      call = self._rows_a_call(length, request)
      for inside, part in packing.cut(call):
        members = group[inside]
        fill = Filler(
          part, lengths[members], round_rows(part.num_rows, shards, call),
          length, 0, RowShards.whole(shards),
        )  # fmt: skip
        own = [texts[i] for i in members]
        yield members, part, fill_texts(fill, own), segments

  def _rows_a_call(self, length: int, request: Request) -> int:
    """Returns the rows of a full call, a multiple of the shards."""
    rows = request.batch_size * request.max_length // length
    if request.get_cache:
      rows = min(rows, CACHE_BYTES // (length * cache_bytes(self.config)))
    shards = row_shards(jax.sharding.get_mesh())
    return max(1, rows // shards) * shards


def cache_bytes(config: Config) -> int:
  """Returns the bytes that a token's keys and values take."""
  model = config.model
  numbers = 2 * model.num_layers * model.num_kv_heads * model.head_dim
  return numbers * np.dtype(jax.numpy.dtype(model.dtype)).itemsize


def round_length(tokens: int) -> int:
  """Returns the length of rows that a text of `tokens` fits.

  Four lengths an octave: a power of two would have a text of 3000 tokens
  computed as 4096.
  """
  step = max(LEAST_ROW // 4, round_up(tokens, LEAST_ROW) // 8)
  return max(LEAST_ROW, -(-tokens // step) * step)


@partial(xla_options.jit, static_argnums=(0, 3, 4, 5))
def _embed(
  config: Config,
  model: Decoder,
  rows: Rows,
  segments: int,
  normalized: bool,
  get_cache: bool,
) -> tuple[jax.Array, list]:
  """Returns [R, M, D], and of each layer keys and values, [R, T, K, H]."""
  kind = embedding_kind(config.model.attention)
  hidden, layers = model.run_to_cache(rows, kind, config.attention_kernel)
  pooled = objective.pool_texts(model, hidden, rows, segments)
  if normalized:
    pooled = pooling.normalise(pooled)
  return pooled, layers if get_cache else []
