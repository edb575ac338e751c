"""A step's batch: packed rows of the two streams.

R rows of T tokens, Q queries with G passages each. A row holds several
segments, one a text; segment 0 is padding. With gradient caching every [R, T]
field below is [chunks, rows a chunk, T] instead. The arrays are NumPy's on the
host and JAX's on the mesh.
"""

import dataclasses
from typing import Generic, TypeVar

import jax

Array = TypeVar('Array')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(Generic[Array]):
  """What the decoder reads of a stream."""

  tokens: Array  # int32 [R, T]
  segments: Array  # int32 [R, T], 1 and up; 0 is padding
  positions: Array  # int32 [R, T], from 0 in each segment
  in_instruction: Array  # bool [R, T]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmbeddingRows(Generic[Array]):
  """Queries and passages, together in rows."""

  rows: Rows[Array]
  # Which row and segment holds a text: row * max_segments + segment - 1.
  query_slots: Array  # int32 [Q]
  passage_slots: Array  # int32 [Q, G], the positive first
  # bool [Q, Q * G], the passages that each query is compared with, its own
  # positive among them; every choice of negatives is a choice of these.
  scored: Array
  chunks: Array  # int32 [], those in use with gradient caching


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerativeRows(Generic[Array]):
  """Conversations in rows."""

  rows: Rows[Array]
  # float32 [R, T], the weight of predicting this token; every reduction of
  # the generative loss is a choice of these.
  loss_weights: Array
  chunks: Array  # int32 [], those in use with gradient caching


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch(Generic[Array]):
  """A global batch; a stream that the mode lacks is None."""

  embedding: EmbeddingRows[Array] | None
  generative: GenerativeRows[Array] | None
