"""How likely a model finds continuations of prompts, in packed rows.

A prompt with its continuation is a segment. Only the states that predict
tokens of continuations go through the head, some of them at a time: logits of
whole rows never exist. Continuations of one token that share a prompt, as the
letters of a multiple choice do, share a segment.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grit_jax import xla_options
from grit_jax.batch import Rows
from grit_jax.config import Config
from grit_jax.data.filling import Filler, RowShards
from grit_jax.data.packing import Packing, pack
from grit_jax.data.pipeline import place_batch
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.errors import UserError
from grit_jax.inference.encoding import (
  LEAST_ROW,
  USUAL_ROW,
  WINDOW,
)
from grit_jax.inference.shapes import round_rows, round_up
from grit_jax.models.attention import generative_kind
from grit_jax.models.decoder import Decoder
from grit_jax.sharding import place_rows, row_shards

# Tokens of a shard's rows whose logits exist at one time: 262 MB in float32
# for 32,000 pieces.
LOGIT_TOKENS = 2**11
# Fewest predicted tokens of a row that a program is compiled for.
LEAST_PREDICTED = 16


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A continuation of a prompt, as tokens.

  Attributes:
    ids: int32 [T], of both.
    prompt_length: How many of them are the prompt's; 1 or more, below T.
    in_instruction: bool [T], the tokens outside answers.
  """

  ids: np.ndarray
  prompt_length: int
  in_instruction: np.ndarray

  @property
  def key(self) -> tuple[bytes, bytes]:
    """What the model reads of it: all but the last token."""
    return self.ids[:-1].tobytes(), self.in_instruction[:-1].tobytes()


class Score(NamedTuple):
  """How likely a continuation is.

  Attributes:
    log_likelihood: The sum of its tokens' log-probabilities, natural.
    greedy: Whether none of its tokens is less likely than another would be.
    tokens: How many tokens it has.
  """

  log_likelihood: float
  greedy: bool
  tokens: int


def encode_candidate(
  tokenizer: Tokenizer, prompt: Sequence[str], continuation: str
) -> Candidate:
  """Tokenizes a prompt with its continuation, as one text.

  The continuation's tokens are those from the first on that the prompt alone
  does not have: a blank at the prompt's end counts as the continuation's where
  both are one token.

  Args:
    tokenizer: The tokenizer.
    prompt: Its parts, in turn instruction and answer; together not empty.
    continuation: What comes after them.

  Raises:
    UserError: The continuation adds no token, or there is none before it.
  """
  alone, part = tokenizer.encode_parts(prompt)
  ids = np.array(tokenizer.encode(''.join(prompt) + continuation), np.int32)
  shared = min(len(alone), len(ids))
  differs = np.flatnonzero(alone[:shared] != ids[:shared])
  length = int(differs[0]) if len(differs) else shared
  if length == len(ids):
    raise UserError(f'The continuation {continuation!r} has no tokens.')
  if not length:
    raise UserError('The prompt has no tokens of its own.')
  in_instruction = np.zeros(len(ids), bool)
  in_instruction[:length] = part[:length] % 2 == 0
  return Candidate(ids, length, in_instruction)


class Scorer:
  """Scores candidates with one model; under `jax.set_mesh`."""

  def __init__(self, config: Config, model: Decoder):
    """Keeps what it scores with."""
    self.config, self.model = config, model

  def score(
    self, candidates: Sequence[Candidate], call_tokens: int
  ) -> Iterator[tuple[int, Score]]:
    """Scores candidates of any mix of lengths.

    Args:
      candidates: What to score.
      call_tokens: Tokens that are computed at one time; a row at least.

    Yields:
      A candidate's number and its score, as soon as that is there.
    """
    shared: dict[tuple[bytes, bytes], list[int]] = {}
    for number, candidate in enumerate(candidates):
      shared.setdefault(candidate.key, []).append(number)
    groups = list(shared.values())
    for start in range(0, len(groups), WINDOW):
      yield from self._score(
        candidates, groups[start : start + WINDOW], call_tokens
      )

  def _score(
    self,
    candidates: Sequence[Candidate],
    groups: Sequence[list[int]],
    call_tokens: int,
  ) -> Iterator[tuple[int, Score]]:
    """Scores groups of candidates that the model reads the same of."""
    mesh = jax.sharding.get_mesh()
    shards = row_shards(mesh)
    lengths = np.array([len(candidates[g[0]].ids) - 1 for g in groups])
    # As in `Encoder`: what fits usual rows does not go into longer ones.
    for fits in (
      np.flatnonzero(lengths > USUAL_ROW),
      np.flatnonzero(lengths <= USUAL_ROW),
    ):
      if not len(fits):
        continue
      length = round_up(int(lengths[fits].max()), LEAST_ROW)
      packing = pack(lengths[fits], length, length)
      call = max(1, call_tokens // length // shards) * shards
      for inside, part in packing.cut(call):
        members = [groups[i] for i in fits[inside]]
        rows = round_rows(part.num_rows, shards, call)
        yield from self._call(candidates, members, part, rows, length)

  def _call(
    self,
    candidates: Sequence[Candidate],
    members: Sequence[list[int]],
    packing: Packing,
    num_rows: int,
    length: int,
  ) -> Iterator[tuple[int, Score]]:
    """Runs one call's rows, and sums its candidates' tokens."""
    mesh = jax.sharding.get_mesh()
    shards = row_shards(mesh)
    heads = [candidates[group[0]] for group in members]
    fill = Filler(
      packing, np.array([len(head.ids) - 1 for head in heads]),
      num_rows, length, 0, RowShards.whole(shards),
    )  # fmt: skip
    rows: Rows = fill.rows(
      [head.ids[:-1] for head in heads],
      fill.join([head.in_instruction[:-1] for head in heads], bool),
    )
    places, targets, spans = _predict(candidates, members, packing, num_rows)
    log_probabilities, best = jax.device_get(
      _predict_tokens(
        self.config, self.model, place_batch(mesh, rows),
        place_rows(mesh, places), place_rows(mesh, targets),
        max(1, LOGIT_TOKENS * shards // num_rows),
      )
    )  # fmt: skip
    for number, row, start, stop in spans:
      own = np.s_[row, start:stop]
      yield (
        number,
        Score(
          float(log_probabilities[own].sum(dtype=np.float64)),
          bool(best[own].all()),
          stop - start,
        ),
      )


def _predict(
  candidates: Sequence[Candidate],
  members: Sequence[list[int]],
  packing: Packing,
  num_rows: int,
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int, int]]]:
  """Lays out which states of a call predict which tokens.

  Returns:
    int32 [R, K], the places in the row, and the tokens, of K predictions a row
    at most; and of each candidate its number, its row, and its predictions.
  """
  used = [0] * num_rows
  spans, found = [], []
  for group, row, offset in zip(
    members, packing.rows.tolist(), packing.offsets.tolist(), strict=True
  ):
    for number in group:
      candidate = candidates[number]
      begin = used[row]
      predicted = np.arange(candidate.prompt_length, len(candidate.ids))
      used[row] += len(predicted)
      spans.append((number, row, begin, used[row]))
      found.append((offset + predicted - 1, candidate.ids[predicted]))
  shape = (num_rows, round_up(max(used), LEAST_PREDICTED))
  places, targets = np.zeros((2, *shape), np.int32)
  for (_, row, begin, end), (where, tokens) in zip(spans, found, strict=True):
    places[row, begin:end] = where
    targets[row, begin:end] = tokens
  return places, targets, spans


@partial(xla_options.jit, static_argnums=(0, 5))
def _predict_tokens(
  config: Config,
  model: Decoder,
  rows: Rows,
  places: jax.Array,
  targets: jax.Array,
  size: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns how likely tokens are, and whether none is likelier.

  Args:
    config: For the attention and its kernel.
    model: The decoder.
    rows: Packed rows, [R, T].
    places: int32 [R, K], the places whose states predict.
    targets: int32 [R, K], the tokens that are predicted.
    size: Predictions of a row whose logits exist at one time, at most.

  Returns:
    float32 [R, K], log-probabilities; bool [R, K].
  """
  kind = generative_kind(config.model.attention)
  (hidden,) = model([rows], [kind], kernel=config.attention_kernel)
  hidden = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
  count = places.shape[1]
  # K is a power of two, so that a smaller one divides it.
  size = min(1 << (size.bit_length() - 1), count)
  head = model.gather_head()

  def chunked(x: jax.Array) -> jax.Array:
    """[R, K, ...] to [K / size, R, size, ...]."""
    x = x.reshape(x.shape[0], count // size, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def score(_: None, chunk: tuple) -> tuple[None, tuple]:
    hidden, targets = chunk
    logits = model.logits(hidden, head)
    # Sums and maxima instead of lookups, as in `losses.next_token_loss`.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    return None, (target - total, target >= logits.max(axis=-1))

  def joined(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count)

  with jax.named_scope('score'):
    _, found = jax.lax.scan(score, None, (chunked(hidden), chunked(targets)))
  return joined(found[0]), joined(found[1])
