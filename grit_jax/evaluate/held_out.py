"""The evaluation of a run on its held-out records.

Retrieval: each held-out query against one positive of every held-out record.
Generation: the loss on held-out conversations. Both through the model's own
packed rows.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from grit_jax import losses, objective, pooling, xla_options
from grit_jax.batch import GenerativeRows, Rows
from grit_jax.config import Config
from grit_jax.data.dataset import EmbeddingDataset, GenerativeDataset
from grit_jax.data.filling import Filler, RowShards, fill_texts
from grit_jax.data.formats import Conversation, EmbeddingText
from grit_jax.data.packing import Packing, pack
from grit_jax.data.pipeline import place_batch
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.evaluate import retrieval
from grit_jax.inference.generation import Completion, Prompt, generate
from grit_jax.inference.sampling import Sampling
from grit_jax.models.attention import embedding_kind, generative_kind
from grit_jax.models.decoder import Decoder
from grit_jax.sharding import own_row_shards, row_shards

EXAMPLES = 3  # retrieved texts, and generated answers, shown


class HeldOutEvaluation:
  """Evaluates a model on held-out records, the same ones every time."""

  def __init__(
    self,
    config: Config,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    embedding: Sequence[EmbeddingDataset],
    generative: Sequence[GenerativeDataset],
  ):
    """Reads the held-out records.

    Args:
      config: of the run.
      mesh: to compute on.
      tokenizer: of the data sets.
      embedding: held-out data sets; empty without the embedding stream.
      generative: held-out data sets; empty without the generative stream.
    """
    self.config, self.mesh, self.tokenizer = config, mesh, tokenizer
    self.shards = RowShards(row_shards(mesh), own_row_shards(mesh))
    records = _sample(embedding, config.evaluation.max_queries)
    self.queries: list[EmbeddingText] = [texts[0] for texts in records]
    # Texts that occur twice are one candidate.
    index: dict[bytes, int] = {}
    self.candidates: list[EmbeddingText] = []
    self.positives = np.zeros(len(records), np.int64)
    for query, texts in enumerate(records):
      key = texts[1].ids.tobytes()
      if key not in index:
        index[key] = len(self.candidates)
        self.candidates.append(texts[1])
      self.positives[query] = index[key]
    self.conversations: list[Conversation] = _sample(
      generative, config.evaluation.max_conversations
    )

  def evaluate(self, model: Decoder) -> dict[str, float]:
    """Returns recall_at_1, recall_at_10, ndcg_at_10, generative_loss, ..."""
    result: dict[str, float] = {}
    if self.queries:
      queries, candidates = self._encode_all(model)
      ranks = retrieval.rank_of_positive(queries, candidates, self.positives)
      result |= retrieval.retrieval_metrics(ranks)
      result['candidates'] = len(candidates)
    if self.conversations:
      result['generative_loss'] = self._generative_loss(model)
    return result

  def baselines(self) -> dict[str, dict[str, float]]:
    """Returns the figures of a random ranking, and of TF-IDF if it has any."""
    if not self.queries:
      return {}
    tfidf = retrieval.tfidf_metrics(
      [self._text(query) for query in self.queries],
      [self._text(candidate) for candidate in self.candidates],
      self.positives,
    )
    random = retrieval.random_metrics(len(self.candidates))
    return {'random': random} | ({'tfidf': tfidf} if tfidf else {})

  def show_examples(self, model: Decoder) -> str:
    """Returns a few retrieved texts and generated answers, to be read."""
    lines = []
    if self.queries:
      queries, candidates = self._encode_all(model)
      ranks = retrieval.rank_of_positive(queries, candidates, self.positives)
      chosen = np.random.default_rng(self.config.seed).permutation(len(ranks))
      for query in chosen[:EXAMPLES]:
        [best], _ = retrieval.top_candidates(queries[query], candidates, 1)
        lines += [
          f'Query: {_shorten(self._text(self.queries[query]), 2)}',
          f'  best of {len(candidates)} (the right one has rank '
          f'{ranks[query] + 1}):',
          _indent(_shorten(self._text(self.candidates[best]), 4)),
        ]
    # Of the longer answers, which show more than a single word would.
    longest = np.argsort([-text.in_loss.sum() for text in self.conversations])
    for index in longest[:: max(1, len(longest) // 8)][1 : 1 + EXAMPLES]:
      conversation = self.conversations[index]
      prompt, answer = self._first_exchange(conversation)
      expected = self.tokenizer.decode_after(prompt, answer)
      generated = self._generate(model, prompt)
      lines += [
        'Prompt:',
        _indent(_shorten(self.tokenizer.decode(prompt), 8)),
        f'  true answer: {_shorten(expected, 2)}',
        f'  generated:   {_shorten(generated.text, 2)}',
      ]
    return '\n'.join(lines)

  def _text(self, text: EmbeddingText) -> str:
    start = text.instruction_length
    return self.tokenizer.decode_after(text.ids[:start], text.ids[start:])

  def _encode_all(self, model: Decoder) -> tuple[np.ndarray, np.ndarray]:
    encoded = self._encode(model, [*self.queries, *self.candidates])
    return encoded[: len(self.queries)], encoded[len(self.queries) :]

  def _encode(
    self, model: Decoder, texts: Sequence[EmbeddingText]
  ) -> np.ndarray:
    """Returns the texts' embeddings, float32 [texts, D] of length 1."""
    encoded: dict[int, np.ndarray] = {}
    for members, packing, fill in self._pack([text.ids for text in texts]):
      rows = fill_texts(fill, [texts[i] for i in members[fill.texts]])
      found = np.asarray(
        _embed(self.config, model, place_batch(self.mesh, rows))
      )
      for i, row, segment in zip(
        members, packing.rows, packing.segments, strict=True
      ):
        encoded[i] = found[row, segment - 1]
    return np.stack([encoded[i] for i in range(len(texts))])

  def _generative_loss(self, model: Decoder) -> float:
    """Returns the mean loss of an answer's token."""
    total, count, texts = 0.0, 0, self.conversations
    for members, _, fill in self._pack([text.ids for text in texts]):
      own = [texts[i] for i in members[fill.texts]]
      in_loss = fill.join([text.in_loss for text in own], bool)
      batch = GenerativeRows(
        fill_texts(fill, own), fill(in_loss, np.float32), np.zeros((), np.int32)
      )
      total += float(
        _loss_sum(self.config, model, place_batch(self.mesh, batch))
      )
      count += sum(int(texts[i].in_loss.sum()) for i in members)
    return total / count

  def _pack(
    self, ids: Sequence[np.ndarray]
  ) -> Iterator[tuple[np.ndarray, Packing, Filler]]:
    """Packs texts into batches of `evaluation.rows` rows.

    Yields:
      The texts' indices, where they lie, and what writes this process's.
    """
    data, rows = self.config.data, self.config.evaluation.rows
    lengths = np.array([len(text) for text in ids])
    packing = pack(lengths, data.row_length, data.max_segments)
    for members, part in packing.cut(rows):
      yield (
        members,
        part,
        Filler(part, lengths[members], rows, data.row_length, 0, self.shards),
      )

  def _first_exchange(
    self, conversation: Conversation
  ) -> tuple[list[int], list[int]]:
    """Returns the prompt and the answer of a conversation's first turn."""
    start = int(np.argmax(conversation.in_loss))
    after = conversation.in_loss[start:]
    stop = start + (len(after) if after.all() else int(np.argmin(after)))
    ids = conversation.ids.tolist()
    return ids[:start], ids[start:stop]

  def _generate(self, model: Decoder, prompt: list[int]) -> Completion:
    """Continues `prompt` greedily: one short answer."""
    ids = np.array(prompt, np.int32)
    sampling = Sampling(self.config.evaluation.generated_tokens)
    request = Prompt(ids, np.ones(len(ids), bool), sampling)
    [answer] = generate(model, self.tokenizer, [request])
    return answer


@partial(xla_options.jit, static_argnums=0)
def _embed(config: Config, model: Decoder, rows: Rows) -> jax.Array:
  [hidden] = model(
    [rows],
    [embedding_kind(config.model.attention)],
    kernel=config.attention_kernel,
  )
  pooled = objective.pool_texts(model, hidden, rows, config.data.max_segments)
  # Every process reads all of them.
  return jax.sharding.reshard(pooling.normalise(pooled), jax.P())


@partial(xla_options.jit, static_argnums=0)
def _loss_sum(
  config: Config, model: Decoder, batch: GenerativeRows
) -> jax.Array:
  [hidden] = model(
    [batch.rows],
    [generative_kind(config.model.attention)],
    kernel=config.attention_kernel,
  )
  return losses.next_token_loss(model, hidden, batch)


def _sample(datasets: Sequence[Any], count: int) -> list:
  """Reads up to `count` records of all data sets, evenly and always alike.

  Whatever the run's seed: so runs of several can be compared.
  """
  total = sum(len(dataset) for dataset in datasets)
  chosen = np.sort(np.random.default_rng(0).permutation(total)[:count])
  found, start = [], 0
  for dataset in datasets:
    inside = (chosen >= start) & (chosen < start + len(dataset))
    found += dataset.read(chosen[inside] - start)
    start += len(dataset)
  return found


def _shorten(text: str, lines: int) -> str:
  kept = [line[:100] for line in text.strip().splitlines()]
  more = [] if len(kept) <= lines else ['...']
  return '\n'.join(kept[:lines] + more)


def _indent(text: str) -> str:
  return '\n'.join(f'    {line}' for line in text.splitlines())
