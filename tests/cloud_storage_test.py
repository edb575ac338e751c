"""What a run writes to gs://, with a bucket that is held in memory."""

import json

import jax
import pytest
import tensorboardX
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from grit_jax.config import ProfileConfig
from grit_jax.metrics import MetricsWriter, plot_losses
from grit_jax.profile import Profile

WORKDIR = epath.Path('gs://bucket/run')


class Bucket(MemoryFileSystem):
  """A bucket: files are written whole, and there is no appending."""

  store, pseudo_dirs = {}, ['']

  @classmethod
  def _strip_protocol(cls, path: str) -> str:
    return '/' + str(path).removeprefix('gs://').strip('/')

  def _open(self, path: str, mode: str = 'rb', **options):
    assert mode in ('rb', 'wb'), mode
    return super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def bucket(monkeypatch, tmp_path):
  """An empty bucket behind every gs://; TensorBoard's files go elsewhere."""
  monkeypatch.chdir(tmp_path)
  Bucket.store.clear()
  backend = type(epath.backend.fsspec_backend)
  monkeypatch.setattr(backend, '_get_filesystem', lambda *_: Bucket())
  opened, writer = [], tensorboardX.SummaryWriter

  def open_writer(folder: str, **options):
    opened.append(folder)
    return writer(str(tmp_path / 'tensorboard'), **options)

  monkeypatch.setattr(tensorboardX, 'SummaryWriter', open_writer)
  yield opened
  # Nothing was taken for the name of a local file.
  assert not (tmp_path / 'gs:').exists()


def write(start: int, stop: int) -> None:
  with MetricsWriter(WORKDIR, start, 9) as writer:
    for step in range(start + 1, stop + 1):
      writer.write(step, {'loss': 1 / step})
      # At once, for nobody says when a machine is taken away.
      assert read_steps()[-1] == step


def read_steps() -> list[int]:
  lines = (WORKDIR / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


def test_metrics_are_those_of_a_run_that_was_never_stopped(bucket):
  write(0, 5)
  write(3, 9)
  assert read_steps() == list(range(1, 10))
  assert bucket == ['gs://bucket/run/tensorboard'] * 2


def test_a_new_run_starts_a_new_file():
  write(0, 5)
  write(0, 2)
  assert read_steps() == [1, 2]


def test_picture_is_written():
  write(0, 5)
  plot_losses(WORKDIR)
  assert (WORKDIR / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_trace_is_written():
  with Profile(ProfileConfig(steps='1'), WORKDIR) as profile:
    with profile.step(1):
      result = jax.numpy.ones(3) + 1
    profile.after(1, result)
  paths = Bucket().find('gs://bucket/run/profile')
  assert any(path.endswith('.xplane.pb') for path in paths)
