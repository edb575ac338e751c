"""Tests of writing a checkpoint a slice at a time."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from file_sizes import limit_file_sizes

from grit_jax import checkpoint as checkpoint_module
from grit_jax.checkpoint import Checkpoint
from grit_jax.convert.streamed import StreamedArray, write_checkpoint
from grit_jax.errors import UserError
from grit_jax.files import LockedError

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
  with pytest.raises(UserError, match='model exists: remove it'):
    write(tmp_path / 'model', arrays)
  assert [path.name for path in tmp_path.iterdir()] == ['model']
  assert not list((tmp_path / 'model').iterdir())


def test_a_target_below_a_file_is_refused(tmp_path, arrays):
  (tmp_path / 'file').touch()
  message = 'file/below/model cannot be written: .*Not a directory'
  with pytest.raises(UserError, match=message):
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


def draw_much(count: int) -> StreamedArray:
  """An array of more bytes than a test lets a file have."""
  x = np.random.default_rng(0).standard_normal((count, 100, 100))
  return stream(x.astype('float32'))


# Of Orbax, whose other items are not begun.
@pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')
def test_a_disk_that_refuses_ends_in_one_message(tmp_path):
  message = f'^{tmp_path}/model cannot be written: [^\n]*$'
  with (
    limit_file_sizes(30_000),
    pytest.raises(UserError, match=message),
  ):
    write_checkpoint(tmp_path / 'model', {'x': draw_much(4)}, {}, {})
  assert not list(tmp_path.iterdir())


# Writes until it is interrupted, and then until it is killed.
WRITE_MUCH = """
  import sys
  import numpy as np
  from grit_jax.convert.streamed import StreamedArray, write_checkpoint

  def parts():
    for i in range(40):
      print(i, flush=True)
      if i == 5:
        sys.stdin.readline()
      yield (i,), np.ones((100, 100), np.float32)

  array = StreamedArray((40, 100, 100), np.dtype('float32'), parts)
  try:
    write_checkpoint(sys.argv[1], {'x': array}, {}, {})
  except KeyboardInterrupt:
    print('interrupted', flush=True)
    sys.stdin.readline()
  else:
    sys.exit('it was not interrupted')
  write_checkpoint(sys.argv[1], {'x': array}, {}, {})
"""


def test_a_stopped_writer_leaves_no_folder_that_looks_whole(tmp_path, arrays):
  child = subprocess.Popen(
    [
      sys.executable, '-c', textwrap.dedent(WRITE_MUCH), tmp_path / 'model',
    ],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  with child:

    def send(number: int) -> None:
      while child.stdout.readline() != '5\n':
        assert child.poll() is None
      assert list(tmp_path.iterdir())
      child.send_signal(number)

    send(signal.SIGINT)
    assert child.stdout.readline() == 'interrupted\n'
    assert not list(tmp_path.glob('model*'))
    child.stdin.write('\n')
    child.stdin.flush()
    send(signal.SIGKILL)
  assert child.returncode == -signal.SIGKILL
  assert 'model' not in [path.name for path in tmp_path.iterdir()]
  # What a killed one left is no obstacle.
  write(tmp_path / 'model', arrays)
  assert [path.name for path in tmp_path.iterdir()] == ['model']


def test_a_second_writer_is_refused_and_removes_nothing(tmp_path):
  def parts():
    with pytest.raises(LockedError, match=f'process {os.getpid()} on'):
      write_checkpoint(tmp_path / 'model', arrays, {}, {})
    yield (), np.ones(3, np.float32)

  arrays = {'x': StreamedArray((3,), np.dtype('float32'), parts)}
  write_checkpoint(tmp_path / 'model', arrays, {}, {})
  assert [path.name for path in tmp_path.iterdir()] == ['model']
