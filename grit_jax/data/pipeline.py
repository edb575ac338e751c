"""From the plan to batches, on the host and on the mesh."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import grain
import jax
import numpy as np

from grit_jax import batch as batches
from grit_jax.config import Config
from grit_jax.data import packing
from grit_jax.data.dataset import EmbeddingDataset, GenerativeDataset
from grit_jax.data.formats import Conversation, EmbeddingText
from grit_jax.data.plan import EmbeddingPlan, GenerativePlan, Plan
from grit_jax.sharding import place


@dataclasses.dataclass(frozen=True)
class HostBatch:
  """A step's batch in numpy, and what is worth knowing of it.

  Attributes:
    batch: the arrays, global.
    useful_tokens: tokens of texts, without padding.
    computed_tokens: tokens that the step runs through the model.
  """

  batch: batches.Batch
  useful_tokens: int
  computed_tokens: int


class Pipeline:
  """Builds the batch of any step."""

  def __init__(
    self,
    config: Config,
    embedding: list[EmbeddingDataset],
    generative: list[GenerativeDataset],
    row_multiple: int,
  ):
    """Plans the run and chooses the shapes of its steps.

    Args:
      config: of the run.
      embedding: data sets; empty without the embedding stream.
      generative: data sets; empty without the generative stream.
      row_multiple: shards of rows.
    """
    self.config = config
    self.plan = Plan(config, embedding, generative)
    counts = np.array([self._count_rows(step) for step in range(config.steps)])
    chunk_rows = config.memory.chunk_rows
    if chunk_rows:
      # One shape for all: the most rows of any step, in whole chunks.
      largest = -(-counts.max(axis=0) // chunk_rows) * chunk_rows
      self.buckets = [(int(largest[0]), int(largest[1]))]
    else:
      self.buckets = packing.choose_buckets(
        counts, config.data.row_buckets, row_multiple
      )

  def _count_rows(self, step: int) -> tuple[int, int]:
    plans = (self.plan.embedding_step(step), self.plan.generative_step(step))
    return tuple(plan.packing.num_rows if plan else 0 for plan in plans)

  @partial(jax.profiler.annotate_function, name='build_batch')
  def build(self, step: int) -> HostBatch:
    """Reads and packs a step's texts."""
    embedding_plan = self.plan.embedding_step(step)
    generative_plan = self.plan.generative_step(step)
    plans = (embedding_plan, generative_plan)
    counts = tuple(plan.packing.num_rows if plan else 0 for plan in plans)
    rows = packing.smallest_bucket(counts, self.buckets)
    chunk_rows = self.config.memory.chunk_rows
    embedding = generative = None
    if embedding_plan:
      embedding = self._build_embedding(embedding_plan, rows[0])
    if generative_plan:
      generative = self._build_generative(generative_plan, rows[1])
    if chunk_rows:
      counts = tuple(-(-count // chunk_rows) * chunk_rows for count in counts)
    return HostBatch(
      batches.Batch(embedding, generative),
      sum(int(plan.lengths.sum()) for plan in plans if plan),
      sum(counts if chunk_rows else rows) * self.config.data.row_length,
    )

  def _build_embedding(
    self, plan: EmbeddingPlan, rows: int
  ) -> batches.EmbeddingRows:
    texts: list[EmbeddingText] = []
    read = _read(self.plan.embedding, plan.datasets, plan.records)
    for record, chosen in zip(read, plan.texts, strict=True):
      texts += [record[text] for text in chosen]
    fill = Filler(plan.packing, plan.lengths, self._shape(rows))
    packed = fill.rows(
      [text.ids for text in texts],
      [text.in_instruction for text in texts],
    )
    slots = plan.packing.rows * self.config.data.max_segments
    slots = (slots + plan.packing.segments - 1).reshape(plan.texts.shape)
    return batches.EmbeddingRows(
      packed,
      (packed.segments > 0) & ~packed.in_instruction,
      slots[:, 0],
      slots[:, 1:],
      self._chunks(plan.packing.num_rows),
    )

  def _build_generative(
    self, plan: GenerativePlan, rows: int
  ) -> batches.GenerativeRows:
    texts: list[Conversation] = _read(
      self.plan.generative, plan.datasets, plan.records
    )
    weights = reduction_weights(
      plan.loss_tokens,
      self.config.objective.generative_reduction,
      self.config.objective.mixed_groups,
    )
    fill = Filler(plan.packing, plan.lengths, self._shape(rows))
    return batches.GenerativeRows(
      fill.rows(
        [text.ids for text in texts], [text.in_instruction for text in texts]
      ),
      fill(
        [t.in_loss * w for t, w in zip(texts, weights, strict=True)],
        np.float32,
      ),
      self._chunks(plan.packing.num_rows),
    )

  def _shape(self, rows: int) -> tuple[int, ...]:
    """Returns the shape of a stream's arrays, with chunks where asked for."""
    data, chunk_rows = self.config.data, self.config.memory.chunk_rows
    if chunk_rows:
      return (rows // chunk_rows, chunk_rows, data.row_length)
    return (rows, data.row_length)

  def _chunks(self, num_rows: int) -> np.ndarray:
    """Returns the chunks that hold `num_rows`; 0 without chunks."""
    chunk_rows = self.config.memory.chunk_rows
    return np.int32(-(-num_rows // chunk_rows) if chunk_rows else 0)

  def iterate(self) -> grain.DatasetIterator:
    """Returns the run's batches; the iterator's state is its place."""
    steps = grain.MapDataset.range(self.config.steps).map(self.build)
    # One thread reads ahead while the step runs; the order is the plan's.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(steps.to_iter_dataset(options))


def reduction_weights(
  loss_tokens: np.ndarray, reduction: str, groups: int
) -> np.ndarray:
  """Returns the weight of each token in the loss, a number a conversation.

  L_gen is the weighted sum of token losses over the sum of weights: the mean
  over all tokens (`token`), over conversations of their means (`sample`), or
  over equal groups of conversations of the groups' means (`mixed`: what the
  reference's devices and accumulation steps make of a token mean each).

  Args:
    loss_tokens: int [N], tokens in the loss of each conversation.
    reduction: `config.ObjectiveConfig.generative_reduction`.
    groups: for `mixed`.

  Returns:
    float32 [N].
  """
  if reduction == 'token':
    weights = np.ones(len(loss_tokens))
  elif reduction == 'sample':
    weights = 1 / loss_tokens
  else:
    totals = loss_tokens.reshape(groups, -1).sum(axis=1)
    weights = np.repeat(1 / totals, len(loss_tokens) // groups)
  return weights.astype(np.float32)


def _read(datasets: list, which: np.ndarray, records: np.ndarray) -> list:
  """Reads records of several data sets, in the order given."""
  found = [None] * len(records)
  for number in np.unique(which):
    places = np.flatnonzero(which == number)
    read = datasets[number].read(records[places])
    for position, record in zip(places, read, strict=True):
      found[position] = record
  return found


class Filler:
  """Writes values a token into packed rows; padding is 0."""

  def __init__(
    self,
    packed: packing.Packing,
    lengths: np.ndarray,
    shape: tuple[int, ...],
  ):
    """Lays down the places.

    Args:
      packed: where each text goes.
      lengths: tokens of each text, in the order of `packed`.
      shape: of the arrays; the last axis is a row.
    """
    self.shape = shape
    self.lengths = lengths.reshape(-1)
    self.segments = packed.segments
    starts = packed.rows.astype(np.int64) * shape[-1] + packed.offsets
    self.positions = np.concatenate([np.arange(n) for n in self.lengths])
    self.places = np.repeat(starts, self.lengths) + self.positions

  def __call__(self, values: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Lays out an array a text."""
    out = np.zeros(self.shape, dtype)
    out.reshape(-1)[self.places] = np.concatenate(values)
    return out

  def rows(
    self, ids: Sequence[np.ndarray], in_instruction: Sequence[np.ndarray]
  ) -> batches.Rows:
    """Returns what the decoder reads."""
    return batches.Rows(
      self(ids, np.int32),
      self([np.repeat(self.segments, self.lengths)], np.int32),
      self([self.positions], np.int32),
      self(in_instruction, bool),
    )


@partial(jax.profiler.annotate_function, name='place_batch')
def place_batch(mesh: jax.sharding.Mesh, batch: batches.Batch) -> batches.Batch:
  """Puts a batch on the mesh: rows split, the slots of texts everywhere."""

  def put(path: tuple, x: np.ndarray) -> jax.Array:
    name = path[-1].name
    if name.endswith('slots') or name == 'chunks':
      return place(mesh, np.asarray(x), *(None,) * np.ndim(x))
    chunked = (None,) if x.ndim == 3 else ()
    return place(mesh, x, *chunked, 'rows', 'seq')

  return jax.tree_util.tree_map_with_path(put, batch)
