"""Checksums of arrays, on devices and on the host."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grit_jax import checksums

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.int8)


def by_definition(x: np.ndarray) -> int:
  """In Python's own numbers, one after the other."""
  words = x.reshape(-1).view(f'u{x.itemsize}').tolist()
  return sum(w * (2 * i + 1) for i, w in enumerate(words)) % 2**32


def draw(shape: tuple[int, ...], dtype: type) -> np.ndarray:
  rng = np.random.default_rng(len(shape))
  return (100 * rng.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_sum_is_the_same_on_devices_and_in_parts(mesh_of, dtype):
  x = draw((4, 16, 24), dtype)
  expected = by_definition(x)
  assert checksums.sum_part(x, 0) == expected
  parts = [
    checksums.sum_part(x[i, j], checksums.start_of((i, j), x.shape))
    for i in range(4)
    for j in range(16)
  ]
  assert sum(parts) % 2**32 == expected
  mesh = mesh_of(2, 2, 2)
  with jax.set_mesh(mesh):
    for spec in P(), P('data', None, 'tensor'), P(None, ('pair', 'fsdp')):
      arrays = {'x': jax.device_put(x, jax.NamedSharding(mesh, spec))}
      assert int(checksums.sum_arrays(arrays)['x']) == expected


def test_parts_larger_than_a_block_and_numbers_alone():
  x = draw((300_001,), np.float16)
  whole = checksums.sum_part(x, 7)
  parts = [checksums.sum_part(x[a:b], 7 + a) for a, b in ((0, 9), (9, 300_001))]
  assert sum(parts) % 2**32 == whole
  number = np.float32(3.5).reshape(())
  sums = checksums.sum_arrays({'x': jax.numpy.asarray(number)})
  assert (
    int(sums['x']) == checksums.sum_part(number, 0) == by_definition(number)
  )


def test_any_change_of_a_number_and_any_two_that_change_places_are_seen():
  x = draw((5, 7), np.float32)
  expected = checksums.sum_part(x, 0)
  for i in range(x.size):
    for bit in range(32):
      changed = x.copy()
      changed.reshape(-1).view(np.uint32)[i] ^= 1 << bit
      assert checksums.sum_part(changed, 0) != expected
    swapped = x.copy().reshape(-1)
    swapped[[i, i - 1]] = swapped[[i - 1, i]]
    assert checksums.sum_part(swapped, 0) != expected
