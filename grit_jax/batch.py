"""A step's batch: packed rows of the two streams.

R rows of T tokens, Q queries with G passages each. A row holds several
segments, one a text; segment 0 is padding. With gradient caching every [R, T]
field below is [chunks, rows a chunk, T] instead.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What the decoder reads of a stream."""

  tokens: jax.Array  # int32 [R, T]
  segments: jax.Array  # int32 [R, T], 1 and up; 0 is padding
  positions: jax.Array  # int32 [R, T], from 0 in each segment
  in_instruction: jax.Array  # bool [R, T]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmbeddingRows:
  """Queries and passages, together in rows."""

  rows: Rows
  # Which row and segment holds a text: row * max_segments + segment - 1.
  query_slots: jax.Array  # int32 [Q]
  passage_slots: jax.Array  # int32 [Q, G], the positive first
  # bool [Q, Q * G], the passages that each query is compared with, its own
  # positive among them; every choice of negatives is a choice of these.
  scored: jax.Array
  chunks: jax.Array  # int32 [], those in use with gradient caching


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerativeRows:
  """Conversations in rows."""

  rows: Rows
  # float32 [R, T], the weight of predicting this token; every reduction of
  # the generative loss is a choice of these.
  loss_weights: jax.Array
  chunks: jax.Array  # int32 [], those in use with gradient caching


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """A global batch; a stream that the mode lacks is None."""

  embedding: EmbeddingRows | None
  generative: GenerativeRows | None
