"""Exact search: each query's k largest inner products over an index.

The devices look for candidates: each holds its rows of a block of the index,
computes their inner products in float32 and keeps its own best of all blocks.
Float32 sums round as the shapes, and so the mesh, have it. So the host scores
the candidates again, in float64, and takes the k best, the lower number first
where scores are equal. A bound on the rounding proves that nothing else could
be among them; a query that it does not prove is searched again with more
candidates. The result is the same on any mesh and for any size of block.

Q queries, S shards (devices), N rows of a device's block, M candidates, D
model.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grit_jax.inference.shapes import round_up

if TYPE_CHECKING:
  from grit_jax.inference.index import Index

# Of the index, on a device at one time: 32 MiB in float32 at D = 4096. While it
# is computed with, the next one is read. Eight times as many took four times as
# long on a CPU: memory that large is new each time.
BLOCK_ROWS = 2048
# Queries of one product: their scores are 8 MiB.
QUERY_BLOCK = 1024
# Rows that the host holds in float64 at one time: 32 MiB at D = 4096.
EXACT_ROWS = 1024

# Fewer candidates prove little; of the next attempt there are more.
_LEAST_CANDIDATES = 16
_MORE_CANDIDATES = 4

# The unit roundoff of float32. A sum of D products is off by D units of
# |query| * |row| at most, in any order. The terms beyond D are for products
# that are themselves sums, of bfloat16 parts on a TPU, and for the scores'
# own rounding to float32.
_ROUNDOFF = 2.0**-24
_FURTHER_TERMS = 16

Best = tuple[jax.Array, jax.Array]


def search(
  index: 'Index', queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the documents with the largest inner products.

  Args:
    index: What to search; all of it is found if it has less than k documents.
    queries: float32 [Q, D], finite.
    k: How many documents.

  Returns:
    Scores, float32 [Q, k], the best first, and the documents' numbers, int64
    [Q, k]. Scores are float64 sums rounded to float32.

  Raises:
    ValueError: Scores may overflow.
  """
  k = min(k, len(index))
  scores = np.empty((len(queries), k), np.float32)
  numbers = np.empty((len(queries), k), np.int64)
  lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
  if (lengths * index.largest_norm > np.finfo(np.float32).max).any():
    raise ValueError('queries are so long that scores overflow float32')
  terms = queries.shape[1] + _FURTHER_TERMS
  margins = terms * _ROUNDOFF * lengths * index.largest_norm
  pending = np.arange(len(queries))
  count = round_up(max(2 * k, _LEAST_CANDIDATES))
  while pending.size:
    bounds, candidates = _find_candidates(index, queries[pending], count)
    unproven = []
    for query, bound, found in zip(pending, bounds, candidates, strict=True):
      found = np.sort(found[found >= 0])
      exact = _score(index, queries[query], found)
      best = np.argsort(-exact, kind='stable')[:k]
      scores[query], numbers[query] = exact[best], found[best]
      least = scores[query, -1]
      if len(found) < len(index) and bound + margins[query] >= least:
        unproven.append(query)
    pending = np.array(unproven, np.int64)
    count *= _MORE_CANDIDATES
  return scores, numbers


def _score(
  index: 'Index', query: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
  """Returns inner products, float32 [M]; the order of a sum is D's alone."""
  query = query.astype(np.float64)
  scores = np.empty(len(numbers), np.float32)
  for start in range(0, len(numbers), EXACT_ROWS):
    part = slice(start, start + EXACT_ROWS)
    rows = index.embeddings(numbers[part]).astype(np.float64)
    scores[part] = np.sum(rows * query, axis=1)
  return scores


def _find_candidates(
  index: 'Index', queries: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the best by float32 scores.

  Returns:
    What no other row's float32 score exceeds, [Q], and the candidates'
    numbers, int32 [Q, M], with -1 where there are fewer rows.
  """
  mesh = _find_mesh()
  shards = mesh.size
  rows = min(BLOCK_ROWS, round_up(-(-len(index) // shards)))
  with jax.set_mesh(mesh):
    blocks = [
      _place_queries(mesh, queries[start : start + QUERY_BLOCK])
      for start in range(0, len(queries), QUERY_BLOCK)
    ]
    best = [_start(mesh, len(block), count) for block in blocks]
    for first in range(0, len(index), rows * shards):
      block = _place_rows(mesh, index, first, rows)
      previous = best
      best = [
        _update(*found, queries, block, first, len(index))
        for found, queries in zip(best, blocks, strict=True)
      ]
      # No more than two blocks are on the devices.
      jax.block_until_ready(previous)
    best = jax.device_get(best)
  scores, numbers = (
    np.concatenate([_join_shards(found[i]) for found in best])[: len(queries)]
    for i in (0, 1)
  )
  kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
  scores, numbers = (
    np.take_along_axis(x, kept, axis=1) for x in (scores, numbers)
  )
  return scores.min(axis=1), numbers


def _find_mesh() -> Mesh:
  """Returns the mesh in force, or one of the first device."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    mesh = Mesh(np.array(jax.devices()[:1]), ('rows',))
  if mesh.is_multi_process:
    raise ValueError(
      'the mesh spans several processes; search is of one process, over its '
      'own devices'
    )
  return mesh


def _place_queries(mesh: Mesh, queries: np.ndarray) -> jax.Array:
  """Puts queries on all devices, padded so that few shapes are compiled."""
  padding = round_up(len(queries)) - len(queries)
  padded = np.pad(queries, ((0, padding), (0, 0)))
  return jax.device_put(padded, NamedSharding(mesh, P()))


def _start(mesh: Mesh, queries: int, count: int) -> Best:
  """Returns the candidates before the first block: none."""
  shape = (mesh.size, queries, count)
  return jax.device_put(
    (np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)),
    NamedSharding(mesh, P(mesh.axis_names)),
  )


def _place_rows(mesh: Mesh, index: 'Index', first: int, rows: int) -> jax.Array:
  """Puts the block from row `first` on the devices, [S * N, D], 0 at its end.

  Each device's rows are read from the disk for it alone.
  """

  def read(place: tuple[slice, ...]) -> np.ndarray:
    start = first + (place[0].start or 0)
    found = index.rows(start, start + rows)
    if len(found) == rows:
      return found
    return np.pad(found, ((0, rows - len(found)), (0, 0)))

  return jax.make_array_from_callback(
    (rows * mesh.size, index.dimension),
    NamedSharding(mesh, P(mesh.axis_names)),
    read,  # type: ignore[arg-type]  # No index is None.
  )


@jax.jit
def _update(
  scores: jax.Array,
  numbers: jax.Array,
  queries: jax.Array,
  block: jax.Array,
  first: jax.Array | int,
  total: jax.Array | int,
) -> Best:
  """Adds a block to each device's own best; nothing moves between devices.

  Args:
    scores: float32 [S, Q, M], of the blocks before.
    numbers: int32 [S, Q, M], of their documents.
    queries: float32 [Q, D].
    block: [S * N, D], as stored.
    first: The number of its first row.
    total: The number of rows of the index; those beyond are padding.

  Returns:
    `scores` and `numbers`.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names
  update = jax.shard_map(
    functools.partial(_update_shard, axes),
    in_specs=(P(axes), P(axes), P(), P(axes), P(), P()),
    out_specs=(P(axes), P(axes)),
  )
  return update(scores, numbers, queries, block, first, total)


def _update_shard(
  axes: tuple[str, ...],
  scores: jax.Array,
  numbers: jax.Array,
  queries: jax.Array,
  block: jax.Array,
  first: jax.Array | int,
  total: jax.Array | int,
) -> Best:
  """Does what `_update` says on one device, where S is 1."""
  rows, count = len(block), scores.shape[-1]
  first = first + jax.lax.axis_index(axes) * rows
  found = jnp.einsum(
    'qd,nd->qn',
    queries,
    block.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  found = jnp.where(first + jnp.arange(rows) < total, found, -jnp.inf)
  best, places = jax.lax.top_k(
    jnp.concatenate([scores[0], found], axis=1), count
  )
  before = jnp.take_along_axis(
    numbers[0], jnp.minimum(places, count - 1), axis=1
  )
  new = jnp.where(jnp.isneginf(best), -1, first + places - count)
  return best[None], jnp.where(places < count, before, new)[None]


def _join_shards(x: np.ndarray) -> np.ndarray:
  """Brings each query's candidates together: [S, Q, M] to [Q, S * M]."""
  return np.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
