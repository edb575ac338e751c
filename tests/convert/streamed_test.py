"""Tests of writing a checkpoint a slice at a time."""

import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax import checkpoint as checkpoint_module
from grit_jax.checkpoint import Checkpoint, CheckpointError
from grit_jax.convert.streamed import StreamedArray, write_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {'model': {'num_layers': 3}}
TOKENIZER = {'tokenizer.model': b'\0\1\2'}


def stream(array: np.ndarray, leading: int = 1) -> StreamedArray:
  def parts():
    for index in np.ndindex(array.shape[:leading]):
      yield index, array[index]

  return StreamedArray(array.shape, array.dtype, parts)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    'blocks/mlp/up': rng.standard_normal((3, 7, 5)).astype('float32'),
    'blocks/norm': np.zeros((3, 5), jnp.bfloat16),
    'experts': rng.standard_normal((3, 2, 4, 6)).astype(jnp.bfloat16),
    'embed': rng.standard_normal((12, 5)).astype(jnp.bfloat16),
    'final_norm': rng.standard_normal(5).astype('float32'),
  }


LEADING = {'embed': 0, 'final_norm': 0, 'experts': 2}


def write(target: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  streamed = {
    path: stream(array, LEADING.get(path, 1)) for path, array in arrays.items()
  }
  write_checkpoint(target, streamed, CONFIG, TOKENIZER)


def test_what_was_streamed_is_restored_bitwise(tmp_path, arrays, mesh_of):
  write(tmp_path / 'model', arrays)
  assert [path.name for path in tmp_path.iterdir()] == ['model']
  checkpoint = Checkpoint(tmp_path / 'model')
  assert checkpoint.read_config() == CONFIG
  assert checkpoint.read_tokenizer() == TOKENIZER
  nested = {}
  for path, array in arrays.items():
    *groups, name = path.split('/')
    inner = nested
    for group in groups:
      inner = inner.setdefault(group, {})
    inner[name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
  with jax.set_mesh(mesh_of(1, 2, 1)):
    model = checkpoint.restore({'model': nested})['model']
  for path, expected in checkpoint_module.flatten(model).items():
    np.testing.assert_array_equal(expected, arrays[path], strict=True)


def test_large_parts_are_split_into_stretches_of_rows(
  tmp_path, arrays, monkeypatch
):
  monkeypatch.setattr(checkpoint_module, 'CHUNK_BYTES', 50)
  write(tmp_path / 'model', arrays)
  checkpoint = Checkpoint(tmp_path / 'model')
  for path, chunk in (
    ('blocks/mlp/up', (1, 1, 5)),  # seven rows of 20 bytes: 7 divides by 1, 7
    ('experts', (1, 1, 4, 6)),
    ('embed', (4, 5)),
  ):
    array = checkpoint.open_array(f'model/{path}')
    assert array.chunk_layout.read_chunk.shape == chunk
    np.testing.assert_array_equal(array.read().result(), arrays[path])


def test_an_existing_target_is_refused_and_left_alone(tmp_path, arrays):
  (tmp_path / 'model').mkdir()
  with pytest.raises(CheckpointError, match='model exists: remove it'):
    write(tmp_path / 'model', arrays)
  assert [path.name for path in tmp_path.iterdir()] == ['model']
  assert not list((tmp_path / 'model').iterdir())


def test_a_target_below_a_file_is_refused(tmp_path, arrays):
  (tmp_path / 'file').touch()
  message = 'file/below/model cannot be written: .*Not a directory'
  with pytest.raises(CheckpointError, match=message):
    write(tmp_path / 'file' / 'below' / 'model', arrays)
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_an_error_in_a_part_leaves_nothing(tmp_path):
  def parts():
    yield (0,), np.zeros(3, 'float32')
    raise RuntimeError('no more')

  array = StreamedArray((2, 3), np.dtype('float32'), parts)
  with pytest.raises(RuntimeError, match='no more'):
    write_checkpoint(tmp_path / 'model', {'norm': array}, CONFIG, TOKENIZER)
  assert not list(tmp_path.iterdir())


WRITE_MUCH = """
  import resource, signal, sys
  import numpy as np
  from grit_jax.checkpoint import CheckpointError
  from grit_jax.convert.streamed import StreamedArray, write_checkpoint

  def parts():
    rng = np.random.default_rng(0)
    for i in range(40):
      print(i, flush=True)
      if sys.argv[2] == 'wait' and i == 5:
        sys.stdin.readline()
      yield (i,), rng.standard_normal((100, 100)).astype('float32')

  if sys.argv[2] == 'full':
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
  array = StreamedArray((40, 100, 100), np.dtype('float32'), parts)
  try:
    write_checkpoint(sys.argv[1], {'x': array}, {}, {})
  except CheckpointError as error:
    sys.exit(f'refused: {error}')
"""


def start(target: pathlib.Path, how: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(WRITE_MUCH), str(target), how],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_disk_that_refuses_ends_in_one_message(tmp_path):
  with start(tmp_path / 'model', 'full') as child:
    _, error = child.communicate()
  assert child.returncode == 1
  message = error.splitlines()[-1]
  assert message.startswith(f'refused: {tmp_path}/model cannot be written: ')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_writer_leaves_no_folder_that_looks_whole(
  tmp_path, arrays, number
):
  with start(tmp_path / 'model', 'wait') as child:
    while child.stdout.readline() != '5\n':
      pass
    child.send_signal(number)
    child.wait()
  assert child.returncode != 0
  names = [path.name for path in tmp_path.iterdir()]
  assert 'model' not in names
  assert number == signal.SIGKILL or not names, names
  # What a killed one left is no obstacle.
  write(tmp_path / 'model', arrays)
  assert [path.name for path in tmp_path.iterdir()] == ['model']
