"""Tests of the safetensors files, read back by the safetensors library."""

import json
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from grit_jax.convert.safetensors_writer import (
  StreamedTensor,
  split_shards,
  write_tensors,
)

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def streamed(array: np.ndarray, rows: int = 2) -> StreamedTensor:
  """A tensor that comes in stretches of some rows."""

  def parts() -> Iterator[np.ndarray]:
    for start in range(0, len(array), rows):
      yield array[start : start + rows]

  return StreamedTensor(array.shape, array.dtype, parts)


def draw(shapes: dict[str, tuple[int, ...]], dtype) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape).astype(dtype)
    for name, shape in shapes.items()
  }


def write(
  folder: pathlib.Path, arrays: dict[str, np.ndarray], limit: int
) -> None:
  write_tensors(
    folder, {name: streamed(array) for name, array in arrays.items()}, limit
  )


@pytest.mark.parametrize('dtype', DTYPES)
def test_library_reads_equal_bits(tmp_path, dtype):
  arrays = draw({'a.weight': (5, 3), 'b': (7,), 'ünïcode': (1, 2, 3)}, dtype)
  write(tmp_path, arrays, 10**9)
  assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
  found = load_file(tmp_path / 'model.safetensors')
  assert set(found) == set(arrays)
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(
      found[name].view(np.uint8), array.view(np.uint8)
    )


def test_header_is_aligned_and_says_pt(tmp_path):
  for length in range(8):
    arrays = draw({'a' * (1 + length): (3, 3)}, np.float32)
    write(tmp_path, arrays, 10**9)
    content = (tmp_path / 'model.safetensors').read_bytes()
    size = int.from_bytes(content[:8], 'little')
    assert size % 8 == 0
    header = content[8 : 8 + size]
    assert header.startswith(b'{') and header.rstrip(b' ').endswith(b'}')
    with safetensors.safe_open(
      tmp_path / 'model.safetensors', framework='np'
    ) as file:
      assert file.metadata() == {'format': 'pt'}


def test_transposed_parts_are_written_in_their_own_order(tmp_path):
  array = np.arange(12, dtype=np.float32).reshape(3, 4).T
  write(tmp_path, {'a': array}, 10**9)
  found = load_file(tmp_path / 'model.safetensors')
  np.testing.assert_array_equal(found['a'], array)


def test_shards_hold_at_most_their_size(tmp_path):
  shapes = {'a': (4, 2), 'b': (2, 2), 'c': (10, 10), 'd': (1,), 'e': (8, 1)}
  arrays = draw(shapes, np.float32)
  write(tmp_path, arrays, 48)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata'] == {
    'total_size': sum(array.nbytes for array in arrays.values())
  }
  files = sorted(path.name for path in tmp_path.glob('*.safetensors'))
  assert files == [f'model-{i:05}-of-00003.safetensors' for i in (1, 2, 3)]
  assert sorted(set(index['weight_map'].values())) == files
  for file in files:
    found = load_file(tmp_path / file)
    names = [
      name for name, place in index['weight_map'].items() if place == file
    ]
    assert set(found) == set(names)
    # A tensor larger than a file is alone in one.
    assert (
      sum(array.nbytes for array in found.values()) <= 48 or len(names) == 1
    )
    for name in names:
      np.testing.assert_array_equal(found[name], arrays[name])


def test_a_full_shard_is_not_split():
  arrays = draw({'a': (2, 3), 'b': (3, 2)}, np.float32)
  tensors = {name: streamed(array) for name, array in arrays.items()}
  assert split_shards(tensors, 48) == [['a', 'b']]
  assert split_shards(tensors, 47) == [['a'], ['b']]
  assert split_shards(tensors, 1) == [['a'], ['b']]


@pytest.mark.parametrize(
  'shape, dtype',
  [((6, 3), np.float32), ((5, 4), np.float32), ((5, 3), np.float16)],
)
def test_parts_that_are_not_the_tensor_are_an_error(tmp_path, shape, dtype):
  array = np.zeros((5, 3), np.float32)
  wrong = StreamedTensor(shape, np.dtype(dtype), streamed(array).parts)
  with pytest.raises(ValueError, match='lm_head'):
    write_tensors(tmp_path, {'lm_head': wrong}, 10**9)
