"""Eight simulated devices, meshes over them, packed rows, random decoders."""

import gc
import hashlib
import importlib.metadata
import os
import pathlib
import signal
from collections.abc import Callable
from typing import NamedTuple

# Tests compile much and compute little: XLA's settings that compile fast. All
# settings are environment variables, for the commands that tests start too.
_FLAGS = [
  '--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE',
  '--xla_cpu_parallel_codegen_split_count=1',
  '--xla_cpu_enable_concurrency_optimized_scheduler=false',
]
_VERSION = importlib.metadata.version('jax')
if _VERSION.startswith('0.10.'):
  # Halves the time to compile; jax 0.12 has no other emitters.
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
# xdist's workers find those of their parent.
_FOUND = os.environ.get('XLA_FLAGS', '').split()
os.environ['XLA_FLAGS'] = ' '.join(dict.fromkeys([*_FOUND, *_FLAGS]))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'

# Programs are compiled once for all tests, workers, commands and runs of
# pytest; `pytest --cache-clear` forgets them.
_KEY = hashlib.sha256(' '.join(_FLAGS).encode()).hexdigest()[:8]
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(
    pathlib.Path(__file__).parents[1]
    / f'.pytest_cache/d/programs-jax-{_VERSION}-{_KEY}'
  ),
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

# A shell has what it starts in the background ignore Ctrl-C, and the commands
# that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many objects that live long: looking for garbage among them at
# Python's own threshold takes a tenth of the suite.
gc.set_threshold(100_000, 20, 20)

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from model_folders import (  # noqa: E402, F401 - fixtures
  draw_tensors,
  json_tokenizer_files,
  tokenizer_model,
  write_hf,
  write_run,
)

from grit_jax import sharding  # noqa: E402
from grit_jax.batch import Rows  # noqa: E402
from grit_jax.config import MeshConfig, ModelConfig  # noqa: E402
from grit_jax.models.decoder import Decoder  # noqa: E402
from grit_jax.models.presets import tiny  # noqa: E402

# Ten times the initial weights: there attention is all but uniform, so that
# wrong rotary angles or a wrong mask would hardly show.
WEIGHT_SCALE = 0.2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts long files first, and small ones last: both workers end together."""
  long = {item.path for item in items if item.get_closest_marker('e2e')}
  sizes = {path: path.stat().st_size for path in {item.path for item in items}}
  items.sort(key=lambda item: (item.path not in long, -sizes[item.path]))


@pytest.fixture(scope='session')
def mesh_of() -> Callable[[int, int, int], Mesh]:
  """Makes the mesh of these sizes over the first of the devices."""

  def make(data: int, fsdp: int, tensor: int) -> Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(MeshConfig(data, fsdp, tensor), devices)

  return make


@pytest.fixture
def one_device(mesh_of: Callable) -> Mesh:
  """The mesh of one device, in force during the test."""
  mesh = mesh_of(1, 1, 1)
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture(scope='session')
def trained(tmp_path_factory) -> NamedTuple:
  """What the training command leaves of a small run: one for all tests."""
  from small_run import train_once

  place = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    place = place.parent
  return train_once(place / 'trained')


@pytest.fixture(scope='session')
def pack() -> Callable[..., Rows]:
  """Draws rows, on the host, from layouts such as `iitt|itt|t`.

  A layout is a row, with a letter a token, i(nstruction) or t(ext), and a bar
  between segments. What is missing to `length` is padding.
  """

  def draw(*layouts: str, length: int, vocab: int = 101, seed: int = 0) -> Rows:
    shape = (len(layouts), length)
    segments = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    in_instruction = np.zeros(shape, bool)
    for row, layout in enumerate(layouts):
      start = 0
      for number, letters in enumerate(layout.split('|'), start=1):
        place = np.s_[row, start : start + len(letters)]
        segments[place] = number
        positions[place] = np.arange(len(letters))
        in_instruction[place] = [letter == 'i' for letter in letters]
        start += len(letters)
    tokens = np.random.default_rng(seed).integers(vocab, size=shape)
    tokens = np.where(segments > 0, tokens, 0).astype(np.int32)
    return Rows(tokens, segments, positions, in_instruction)

  return draw


@pytest.fixture(scope='session')
def random_decoder() -> Callable[..., Decoder]:
  """Draws a decoder, the same on every mesh and without compiling."""

  def draw(mesh: Mesh, config: ModelConfig | None = None) -> Decoder:
    config = config or tiny()
    rng = np.random.default_rng(0)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
      values = WEIGHT_SCALE * rng.standard_normal(leaf.shape)
      if 'norm' in jax.tree_util.keystr(path):
        values = values + 1
      stored = NamedSharding(mesh, leaf.sharding.spec)
      return jax.device_put(values.astype(leaf.dtype), stored)

    with jax.set_mesh(mesh):
      shapes = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
      return jax.tree_util.tree_map_with_path(fill, shapes)

  return draw
