"""From the plan to batches, on the host and on the mesh.

Every process knows the whole plan of a step, and builds the rows of its own
devices alone: it reads no record that has no text in them.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import grain
import jax
import numpy as np
from absl import logging

from grit_jax import batch as batches
from grit_jax.config import Config
from grit_jax.data import packing
from grit_jax.data.dataset import EmbeddingDataset, GenerativeDataset
from grit_jax.data.filling import Filler, RowShards
from grit_jax.data.plan import EmbeddingPlan, GenerativePlan, Plan
from grit_jax.sharding import place, place_rows

# Steps whose rows are counted to choose the shapes; of a longer run as many,
# evenly spread. A step costs some milliseconds, in every process.
COUNTED_STEPS = 2000


@dataclasses.dataclass(frozen=True)
class HostBatch:
  """A step's batch in numpy, and what is worth knowing of it.

  Attributes:
    batch: the arrays; of those of rows, the rows of this process's devices.
    useful_tokens: tokens of texts, without padding, over all processes.
    computed_tokens: tokens that the step runs through the model, likewise.
  """

  batch: batches.Batch[np.ndarray]
  useful_tokens: int
  computed_tokens: int


class Pipeline:
  """Builds the batch of any step."""

  def __init__(
    self,
    config: Config,
    embedding: list[EmbeddingDataset],
    generative: list[GenerativeDataset],
    shards: RowShards,
  ):
    """Plans the run and chooses the shapes of its steps.

    Args:
      config: of the run.
      embedding: data sets; empty without the embedding stream.
      generative: data sets; empty without the generative stream.
      shards: how the mesh splits rows, and which shards are this process's.
    """
    self.config, self.shards = config, shards
    self.plan = Plan(config, embedding, generative)
    steps = np.arange(config.steps)
    if len(steps) > COUNTED_STEPS:
      steps = np.linspace(0, config.steps - 1, COUNTED_STEPS).astype(int)
    counts = np.array([self._count_rows(step) for step in steps.tolist()])
    if config.memory.chunk_rows:
      # One shape for all: the most rows of any step, in whole chunks.
      self.buckets = [self._round_up(counts.max(axis=0))]
    else:
      self.buckets = packing.choose_buckets(
        counts, config.data.row_buckets, shards.count
      )

  def _count_rows(self, step: int) -> tuple[int, int]:
    return _rows_of(
      self.plan.embedding_step(step), self.plan.generative_step(step)
    )

  def _round_up(self, counts: Sequence[int]) -> tuple[int, int]:
    """Rounds rows up to whole chunks, or to what the shards divide."""
    multiple = self.config.memory.chunk_rows or self.shards.count
    embedding, generative = (-(-int(n) // multiple) * multiple for n in counts)
    return embedding, generative

  def _choose_shape(self, step: int, counts: tuple[int, int]) -> tuple:
    """Returns the rows of both streams that a step is padded to.

    A step that was not counted may have more rows than all that were: it gets
    a shape of its own, which is compiled when it comes.
    """
    shape = packing.smallest_bucket(counts, self.buckets)
    if shape is None:
      shape = self._round_up(counts)
      logging.warning(
        'Step %d has %s rows (embedding, generative), more than any shape '
        'that was planned for: its own is compiled.',
        step + 1,
        shape,
      )
    return shape

  @partial(jax.profiler.annotate_function, name='build_batch')
  def build(self, step: int) -> HostBatch:
    """Reads and packs a step's texts."""
    embedding_plan = self.plan.embedding_step(step)
    generative_plan = self.plan.generative_step(step)
    plans = (embedding_plan, generative_plan)
    counts = _rows_of(*plans)
    rows = self._choose_shape(step, counts)
    embedding = generative = None
    if embedding_plan:
      embedding = self._build_embedding(embedding_plan, rows[0])
    if generative_plan:
      generative = self._build_generative(generative_plan, rows[1])
    # Chunks that are not in use are not computed.
    computed = self._round_up(counts) if self.config.memory.chunk_rows else rows
    return HostBatch(
      batches.Batch(embedding, generative),
      sum(int(plan.lengths.sum()) for plan in plans if plan),
      sum(computed) * self.config.data.row_length,
    )

  def _fill(
    self, plan: EmbeddingPlan | GenerativePlan, num_rows: int
  ) -> Filler:
    return Filler(
      plan.packing,
      plan.lengths.reshape(-1),
      num_rows,
      self.config.data.row_length,
      self.config.memory.chunk_rows,
      self.shards,
    )

  def _build_embedding(
    self, plan: EmbeddingPlan, num_rows: int
  ) -> batches.EmbeddingRows[np.ndarray]:
    fill = self._fill(plan, num_rows)
    places, chosen = np.divmod(fill.texts, plan.texts.shape[1])
    read = _read(
      self.plan.embedding, plan.datasets, plan.records, np.unique(places)
    )
    texts = [
      read[place][text]
      for place, text in zip(
        places.tolist(), plan.texts[places, chosen].tolist(), strict=True
      )
    ]
    lengths = np.array([text.instruction_length for text in texts], np.int64)
    rows = fill.rows(
      [text.ids for text in texts], fill.positions < fill.repeat(lengths)
    )
    slots = plan.packing.rows * self.config.data.max_segments
    slots = (slots + plan.packing.segments - 1).reshape(plan.texts.shape)
    return batches.EmbeddingRows(
      rows,
      slots[:, 0],
      slots[:, 1:],
      self.plan.scored(plan),
      self._chunks(plan.packing.num_rows),
    )

  def _build_generative(
    self, plan: GenerativePlan, num_rows: int
  ) -> batches.GenerativeRows[np.ndarray]:
    fill = self._fill(plan, num_rows)
    read = _read(self.plan.generative, plan.datasets, plan.records, fill.texts)
    texts = [read[place] for place in fill.texts.tolist()]
    weights = reduction_weights(
      plan.loss_tokens,
      self.config.objective.generative_reduction,
      self.config.objective.mixed_groups,
    )
    in_loss = fill.join([text.in_loss for text in texts], bool)
    return batches.GenerativeRows(
      fill.rows(
        [text.ids for text in texts],
        fill.join([text.in_instruction for text in texts], bool),
      ),
      fill(in_loss * fill.repeat(weights[fill.texts]), np.float32),
      self._chunks(plan.packing.num_rows),
    )

  def _chunks(self, num_rows: int) -> np.ndarray:
    """Returns the chunks that hold `num_rows`; 0 without chunks."""
    chunk_rows = self.config.memory.chunk_rows
    return np.array(-(-num_rows // chunk_rows) if chunk_rows else 0, np.int32)

  def iterate(self) -> grain.DatasetIterator:
    """Returns the run's batches; the iterator's state is its place."""
    steps = grain.MapDataset.range(self.config.steps).map(self.build)
    # One thread reads ahead while the step runs; the order is the plan's.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(steps.to_iter_dataset(options))


def _rows_of(
  embedding: EmbeddingPlan | None, generative: GenerativePlan | None
) -> tuple[int, int]:
  """Returns the packed rows of a step's streams; 0 of an absent one."""
  return (
    embedding.packing.num_rows if embedding else 0,
    generative.packing.num_rows if generative else 0,
  )


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


def _read(
  datasets: list, which: np.ndarray, records: np.ndarray, places: np.ndarray
) -> dict:
  """Reads some places of a batch, each a record of one of several data sets."""
  found: dict = {}
  for number in np.unique(which[places]):
    wanted = places[which[places] == number]
    read = datasets[number].read(records[wanted])
    found.update(zip(wanted.tolist(), read, strict=True))
  return found


@partial(jax.profiler.annotate_function, name='place_batch')
def place_batch(mesh: jax.sharding.Mesh, batch: batches.Batch) -> batches.Batch:
  """Puts a batch on the mesh: rows split, what is of texts everywhere.

  Args:
    mesh: of all processes.
    batch: in every process, of the arrays of rows, its own devices' rows.
  """

  def put(path: tuple, x: np.ndarray) -> jax.Array:
    name = path[-1].name
    if name in ('query_slots', 'passage_slots', 'scored', 'chunks'):
      return place(mesh, np.asarray(x), *(None,) * np.ndim(x))
    return place_rows(mesh, x)

  return jax.tree_util.tree_map_with_path(put, batch)
