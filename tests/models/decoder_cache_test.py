"""Tests of what extends a decoder's cache, against one pass over the text."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from grit_jax import sharding
from grit_jax.batch import Rows
from grit_jax.config import ModelConfig
from grit_jax.models import presets
from grit_jax.models.attention import Kind
from grit_jax.models.blockwise import KEYS
from grit_jax.models.decoder import Chunk, Decoder, KeysValues

# Two float32 programs over two layers, states of size 1.
SAME_TOLERANCE = 1e-5

DENSE = dataclasses.replace(presets.tiny(), rope_theta=100.0)
CONFIGS = {
  'dense': DENSE,
  'window': dataclasses.replace(DENSE, sliding_window=3),
  'experts': presets.tiny_moe(),
}
MESHES = [
  ('window', (1, 1, 1)),
  ('dense', (2, 2, 2)),
  ('experts', (1, 2, 2)),
]

ROWS, LENGTH = 4, 14
# The texts lie in two blocks of a cache.
PLACES, MIDDLE = KEYS + 20, KEYS + 3
# What a place holds that nobody has written: it shows wherever it is read.
UNWRITTEN = 1e3

CACHE = ('rows', 'kv_heads', 'seq', 'head_dim')
TOKENS = np.random.default_rng(0).integers(101, size=(ROWS, LENGTH))


@jax.jit
def extend(
  model: Decoder, chunk: Chunk, cache: list[KeysValues]
) -> tuple[jax.Array, list[KeysValues]]:
  return model.extend(chunk, cache)


@jax.jit
def keep(model: Decoder, rows: Rows) -> tuple[jax.Array, list[KeysValues]]:
  return model.run_to_cache(rows, Kind.CAUSAL, 'auto')


def run_to_cache(
  mesh: Mesh, model: Decoder, lengths: Sequence[int]
) -> tuple[np.ndarray, list[tuple[np.ndarray, ...]]]:
  """States, keys and values of the first tokens of each row."""
  index = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
  segments = (index < np.array(lengths)[:, None]).astype('int32')
  fields = (TOKENS.astype('int32'), segments, index.astype('int32'))
  rows = Rows(
    *(sharding.place(mesh, x, 'rows', 'seq') for x in fields),
    sharding.place(mesh, index < 3, 'rows', 'seq'),
  )
  return jax.tree.map(np.asarray, keep(model, rows))


def run_on_one_device(
  mesh_of: Callable, random_decoder: Callable, config: ModelConfig
) -> tuple[np.ndarray, list[tuple[np.ndarray, ...]]]:
  """The same of whole rows, as one causal pass."""
  mesh = mesh_of(1, 1, 1)
  model = random_decoder(mesh, config)
  with jax.set_mesh(mesh):
    return run_to_cache(mesh, model, [LENGTH] * ROWS)


def make_chunk(
  mesh: Mesh, done: Sequence[int], counts: Sequence[int], end: int, window: int
) -> Chunk:
  """Each row's next tokens, before the place `end`."""
  size = max(counts)
  shape = (ROWS, size)
  tokens, positions = np.full(shape, 7, 'int32'), np.zeros(shape, 'int32')
  real = np.zeros(shape, bool)
  first, last = np.zeros(shape, 'int32'), np.full(shape, -1, 'int32')
  for row, (before, count) in enumerate(zip(done, counts, strict=True)):
    for i in range(count):
      place = np.s_[row, size - count + i]
      tokens[place] = TOKENS[row, before + i]
      positions[place] = before + i
      real[place] = True
      first[place] = end - count - before
      last[place] = end - count + i
      if window:
        first[place] = max(first[place], last[place] - window + 1)
  fields = (tokens, positions, real, first, last)
  return Chunk(
    *(sharding.place(mesh, x, 'rows', 'seq') for x in fields),
    start=sharding.place(mesh, np.array(end - size, 'int32')),
  )


def empty_cache(config: ModelConfig) -> list[tuple[np.ndarray, ...]]:
  shape = (ROWS, config.num_kv_heads, PLACES, config.head_dim)
  layer = tuple(np.full(shape, UNWRITTEN, 'float32') for _ in range(2))
  return [layer] * config.num_layers


def place_cache(mesh: Mesh, cache: list) -> list[KeysValues]:
  return jax.tree.map(lambda x: sharding.place(mesh, x, *CACHE), cache)


@pytest.mark.parametrize(
  ('name', 'shape', 'sizes'),
  [('dense', (1, 1, 1), (14,))] + [(*mesh, (4, 4, 4, 1, 1)) for mesh in MESHES],
)
def test_any_chunks_of_a_text_give_the_states_of_one_pass(
  mesh_of: Callable,
  random_decoder: Callable,
  name: str,
  shape: tuple,
  sizes: tuple,
):
  config, mesh = CONFIGS[name], mesh_of(*shape)
  expected, _ = run_on_one_device(mesh_of, random_decoder, config)
  states, done, end = [], 0, MIDDLE - 8
  with jax.set_mesh(mesh):
    model = random_decoder(mesh, config).unstack()
    cache = place_cache(mesh, empty_cache(config))
    for size in sizes:
      end += size
      chunk = make_chunk(
        mesh, [done] * ROWS, [size] * ROWS, end, config.sliding_window
      )
      hidden, cache = extend(model, chunk, cache)
      states.append(hidden)
      done += size
  assert done == LENGTH
  np.testing.assert_allclose(
    np.concatenate([np.asarray(x) for x in states], axis=1),
    expected,
    atol=SAME_TOLERANCE,
  )


@pytest.mark.parametrize(('name', 'shape'), MESHES)
def test_uneven_rows_go_on_from_uneven_caches(
  mesh_of: Callable, random_decoder: Callable, name: str, shape: tuple
):
  config, mesh = CONFIGS[name], mesh_of(*shape)
  window = config.sliding_window
  states, layers = run_on_one_device(mesh_of, random_decoder, config)
  done, counts = np.array([9, 4, 6, 0]), np.array([1, 4, 0, 3])
  with jax.set_mesh(mesh):
    model = random_decoder(mesh, config)
    _, kept = run_to_cache(mesh, model, done)
    # Each row's cache ends where its next tokens will begin.
    before = [tuple(x.copy() for x in layer) for layer in empty_cache(config)]
    pairs = map(jax.tree.leaves, (before, kept))
    for old, new in zip(*pairs, strict=True):
      for row, end in enumerate(MIDDLE - counts):
        place = np.s_[row, :, end - done[row] : end]
        old[place] = new[row, : done[row]].swapaxes(0, 1)
    model, cache = model.unstack(), place_cache(mesh, before)
    chunk = make_chunk(mesh, done, counts, MIDDLE, window)
    hidden, cache = extend(model, chunk, cache)
    one = make_chunk(mesh, done + counts, [1] * ROWS, MIDDLE + 1, window)
    next_hidden, after = extend(model, one, cache)
  hidden, next_hidden, after = jax.tree.map(
    np.asarray, (hidden, next_hidden, after)
  )
  for row in range(ROWS):
    end = done[row] + counts[row]
    for found, stop, count in (
      (hidden, end, counts[row]), (next_hidden, end + 1, 1)
    ):  # fmt: skip
      np.testing.assert_allclose(
        found[row, found.shape[1] - count :],
        states[row, stop - count : stop],
        atol=SAME_TOLERANCE,
      )
    arrays = map(jax.tree.leaves, (before, after, layers))
    for old, new, whole in zip(*arrays, strict=True):
      expected = old[row].copy()
      place = np.s_[:, MIDDLE - counts[row] : MIDDLE + 1]
      np.testing.assert_allclose(
        new[row][place],
        whole[row, done[row] : end + 1].swapaxes(0, 1),
        atol=SAME_TOLERANCE,
      )
      expected[place] = new[row][place]
      np.testing.assert_array_equal(new[row], expected)


@pytest.mark.parametrize(('name', 'shape'), MESHES[1:])
def test_unstacked_equals_stacked(
  mesh_of: Callable, random_decoder: Callable, name: str, shape: tuple
):
  mesh = mesh_of(*shape)
  with jax.set_mesh(mesh):
    model = random_decoder(mesh, CONFIGS[name])
    lengths = [14, 3, 9, 1]
    expected = run_to_cache(mesh, model, lengths)
    found = run_to_cache(mesh, model.unstack(), lengths)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=SAME_TOLERANCE),
    found,
    expected,
  )


@pytest.mark.parametrize('kernel', ['xla', 'splash'])
def test_pass_that_keeps_a_cache_is_that_of_training(
  one_device: Mesh, random_decoder: Callable, pack: Callable, kernel: str
):
  model = random_decoder(one_device, DENSE)
  rows = jax.tree.map(
    lambda x: sharding.place(one_device, x, 'rows', 'seq'),
    pack('iitt|ititt|iit', 'ittittt', length=LENGTH),
  )
  kind = Kind.TEXT

  def cache(model: Decoder, rows: Rows) -> jax.Array:
    return model.run_to_cache(rows, kind, kernel)[0]

  def train(model: Decoder, rows: Rows) -> jax.Array:
    return model([rows], [kind], kernel=kernel)[0]

  found, expected = (jax.jit(f)(model, rows) for f in (cache, train))
  np.testing.assert_allclose(found, expected, atol=SAME_TOLERANCE)
  traced = str(jax.make_jaxpr(cache)(model, rows))
  assert ('pallas_call' in traced) == (kernel == 'splash')
