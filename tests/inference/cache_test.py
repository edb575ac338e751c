"""Tests of KV caches on the host and on the disk."""

import pathlib

import numpy as np
import pytest

from grit_jax.errors import UserError
from grit_jax.inference.cache import KVCache


def draw(tokens: int, seed: int = 0) -> KVCache:
  rng = np.random.default_rng(seed)
  return KVCache(*rng.standard_normal((2, 3, 2, tokens, 4)).astype('float32'))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_saved_cache_is_mapped_back_bit_for_bit(
  tmp_path: pathlib.Path, dtype: str
):
  cache = draw(5).astype(dtype)
  cache.save(tmp_path / 'cache.npy')
  opened = KVCache.open(tmp_path / 'cache.npy')
  assert opened.keys.dtype == dtype
  assert isinstance(opened.keys.base, np.memmap) or isinstance(
    opened.keys, np.memmap
  )
  np.testing.assert_array_equal(opened.keys, cache.keys)
  np.testing.assert_array_equal(opened.values, cache.values)


def test_size_is_that_of_keys_and_values_a_token():
  assert len(draw(5)) == 5
  assert draw(5).nbytes == 5 * 2 * 3 * 2 * 4 * 4
  assert draw(5).astype('bfloat16').nbytes == draw(5).nbytes // 2


def test_joined_caches_stand_one_behind_the_other():
  first, second = draw(2), draw(3, seed=1)
  joined = KVCache.join([first, second])
  assert len(joined) == 5
  np.testing.assert_array_equal(joined.keys[:, :, :2], first.keys)
  np.testing.assert_array_equal(joined.values[:, :, 2:], second.values)


def test_a_file_that_is_no_cache_is_named(tmp_path: pathlib.Path):
  path = tmp_path / 'cache.npy'
  with pytest.raises(UserError, match='cache.npy'):
    KVCache.open(path)
  np.save(path, np.zeros((2, 3)))
  with pytest.raises(UserError, match=r'float64\[2, 3\]'):
    KVCache.open(path)
  path.write_bytes(b'nothing')
  with pytest.raises(UserError, match='cache.npy'):
    KVCache.open(path)
