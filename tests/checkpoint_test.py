"""Tests of checkpoints."""

import dataclasses
import functools
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grit_jax import checkpoint as checkpoint_module
from grit_jax import optimizer
from grit_jax.checkpoint import (
  Checkpoint,
  Checkpoints,
  find_checkpoint,
  flatten,
  has_checkpoint,
)
from grit_jax.config import OptimizerConfig
from grit_jax.errors import UserError
from grit_jax.models import presets
from grit_jax.models.decoder import Decoder

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {'model': {'vocab_size': 101, 'dtype': 'float32'}, 'steps': 12}
# Not text, and long enough for half of it to be missed.
TOKENIZER = {
  'tokenizer.json': bytes(range(256)) * 8,
  'tokenizer_config.json': b'{}',
}
TRANSFORMATION = optimizer.make_optimizer(OptimizerConfig(), 10)


def abstract_state(mesh: Mesh, **changes: int | str) -> dict:
  """The state's types on a mesh; traced once for each mesh and changes."""
  return _abstract_state(mesh, tuple(changes.items()))


@functools.cache
def _abstract_state(mesh: Mesh, changes: tuple) -> dict:
  config = dataclasses.replace(presets.tiny(), **dict(changes))

  def init() -> dict:
    model = Decoder(config, jax.random.key(0))
    return {
      'model': model,
      'optimizer': TRANSFORMATION.init(model),
      'step': jnp.zeros((), jnp.int32),
    }

  with jax.set_mesh(mesh):
    return jax.eval_shape(init)


def random_state(mesh: Mesh) -> dict:
  """A state whose arrays all differ, without compiling anything."""
  rng = np.random.default_rng(0)

  def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
    spec = PartitionSpec() if x.sharding is None else x.sharding.spec
    values = np.asarray(100 * rng.standard_normal(x.shape), x.dtype)
    return jax.device_put(values, NamedSharding(mesh, spec))

  return jax.tree.map(fill, abstract_state(mesh))


def make_iterator() -> grain.DatasetIterator:
  return iter(grain.MapDataset.range(100).map(lambda x: x**2).to_iter_dataset())


def advance(iterator: grain.DatasetIterator, steps: int) -> list[int]:
  return [int(next(iterator)) for _ in range(steps)]


def assert_equal(actual: dict, expected: dict) -> None:
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(
      np.asarray(a), np.asarray(b), strict=True
    ),
    actual,
    expected,
  )


def listing(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
  return {
    path: path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }


@pytest.fixture(scope='module')
def saved(tmp_path_factory, mesh_of) -> tuple[pathlib.Path, dict]:
  """A workdir with a checkpoint of step 7, and its state; not to be changed."""
  workdir = tmp_path_factory.mktemp('saved')
  state = random_state(mesh_of(2, 2, 2))
  iterator = make_iterator()
  advance(iterator, 7)
  with Checkpoints(workdir, keep=2) as checkpoints:
    assert checkpoints.latest() is None
    assert checkpoints.save(7, state, iterator, CONFIG, TOKENIZER, {})
    # After the call, so not a part of the checkpoint.
    advance(iterator, 3)
  return workdir, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 8, 1), (1, 1, 1)])
def test_state_is_bitwise_the_same_on_any_mesh(saved, mesh_of, shape):
  workdir, expected = saved
  mesh = mesh_of(*shape)
  with jax.set_mesh(mesh):
    wanted = abstract_state(mesh)
    state = find_checkpoint(workdir).restore(wanted)
    assert_equal(state, expected)
    leaves = zip(*map(jax.tree.leaves, (state, wanted)), strict=True)
    for x, type_ in leaves:
      spec = type_.sharding.spec if type_.sharding else PartitionSpec()
      assert x.sharding == NamedSharding(mesh, spec) and x.committed


def test_state_is_restored_without_a_mesh(saved):
  workdir, expected = saved
  wanted = {'step': jax.ShapeDtypeStruct((), jnp.int32)}
  state = find_checkpoint(workdir).restore(wanted)
  assert_equal(state, {'step': expected['step']})


def test_the_model_alone_can_be_restored(saved, mesh_of):
  workdir, expected = saved
  mesh = mesh_of(1, 8, 1)
  with jax.set_mesh(mesh):
    wanted = {'model': abstract_state(mesh)['model']}
    state = find_checkpoint(workdir).restore(wanted)
  assert_equal(state, {'model': expected['model']})


def test_arrays_are_saved_under_the_names_in_the_code(saved):
  workdir, expected = saved
  folder = find_checkpoint(workdir).folder / 'state'
  tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
  names = nnx.to_pure_dict(nnx.state(expected['model']))
  saved_structure = jax.tree.structure(jax.tree.map(lambda _: 0, tree['model']))
  assert saved_structure == jax.tree.structure(names)
  moments = tree['optimizer']['1']['0']['nu']
  assert moments['blocks']['attention']['q'].shape == (2, 32, 40)


def test_data_config_and_tokenizer_are_restored(saved, mesh_of):
  workdir, _ = saved
  iterator = make_iterator()
  mesh = mesh_of(1, 8, 1)
  checkpoint = find_checkpoint(workdir)
  with jax.set_mesh(mesh):
    wanted = {'step': abstract_state(mesh)['step']}
    checkpoint.restore(wanted, iterator)
  assert advance(iterator, 3) == [49, 64, 81]
  assert checkpoint.read_config() == CONFIG
  assert checkpoint.read_tokenizer() == TOKENIZER
  for name, content in TOKENIZER.items():
    assert (checkpoint.folder / 'tokenizer' / name).read_bytes() == content


def test_data_is_restored_on_another_number_of_processes(saved, tmp_path):
  workdir = shutil.copytree(saved[0], tmp_path / 'copy')
  iterator = make_iterator()
  checkpoint = find_checkpoint(workdir)
  folder = checkpoint.folder / 'data'
  (folder / 'process_0-of-1.json').rename(folder / 'process_0-of-4.json')
  step = {'step': jax.ShapeDtypeStruct((), jnp.int32)}
  checkpoint.restore(step, iterator)
  assert advance(iterator, 1) == [49]


def test_the_newest_are_kept_and_an_existing_one_is_not_replaced(tmp_path):
  state = {'step': jnp.zeros((), jnp.int32)}
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 5, 9):
      assert checkpoints.save(
        step, state, make_iterator(), {'step': step}, TOKENIZER, {}
      )
    assert not checkpoints.save(9, state, make_iterator(), {}, TOKENIZER, {})
    checkpoints.wait()
    assert checkpoints.latest() == 9
  folder = tmp_path / 'checkpoints'
  assert sorted(path.name for path in folder.iterdir()) == ['5', '9']
  # A run that goes on from an older step comes by the newer ones again.
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert not checkpoints.save(5, state, make_iterator(), {}, TOKENIZER, {})
    assert checkpoints.open(5).read_config() == {'step': 5}
    assert checkpoints.open(9).read_config() == {'step': 9}


def test_the_state_can_be_donated_while_it_is_being_saved(tmp_path):
  values = {f'x{i}': jnp.full((256, 256), i, jnp.float32) for i in range(8)}
  expected = jax.tree.map(np.array, values)
  types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)

  def step(tree):
    return jax.tree.map(lambda x: x * 2 + 1, tree)

  donate = jax.jit(step, donate_argnums=0)
  donate.lower(values).compile()
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, values, make_iterator(), {}, TOKENIZER, {})
    for _ in range(3):
      values = donate(values)
    jax.block_until_ready(values)
    checkpoints.wait()
    assert_equal(checkpoints.open(1).restore(types), expected)


def test_a_killed_save_leaves_the_former_checkpoint(tmp_path):
  program = """
    import sys, time
    import grain, jax.numpy as jnp
    import orbax.checkpoint as ocp
    from grit_jax.checkpoint import Checkpoints

    def state(step):
      return {'weight': jnp.full((64, 64), step, jnp.float32)}

    iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
    with Checkpoints(sys.argv[1], keep=2) as checkpoints:
      checkpoints.save(1, state(1), iterator, {}, {'tokens': b'x'}, {})
      checkpoints.wait()
      async def hang(*_):
        print('saving', flush=True)
        time.sleep(60)
      ocp.JsonCheckpointHandler._save_fn = hang
      checkpoints.save(2, state(2), iterator, {}, {'tokens': b'x'}, {})
  """
  child = subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(program), str(tmp_path)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  with child:
    assert child.stdout.readline() == 'saving\n'
    child.send_signal(signal.SIGKILL)
  folder = tmp_path / 'checkpoints'
  names = sorted(path.name for path in folder.iterdir())
  assert len(names) == 2 and names[0] == '1' and names[1] != '2', names
  wanted = {'weight': jax.ShapeDtypeStruct((64, 64), jnp.float32)}
  assert find_checkpoint(tmp_path).folder.name == '1'
  with pytest.raises(UserError, match='not written to its end'):
    Checkpoint(folder / names[1])
  assert len(list(folder.iterdir())) == 2, 'a reader has cleaned'
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest() == 1
    state = checkpoints.open(1).restore(wanted, make_iterator())
    np.testing.assert_array_equal(state['weight'], np.ones((64, 64)))
    # Another step than the killed one, whose folder has to go by itself.
    assert checkpoints.save(3, state, make_iterator(), {}, TOKENIZER, {})
    checkpoints.wait()
    assert checkpoints.latest() == 3
  assert sorted(path.name for path in folder.iterdir()) == ['1', '3']


def read_all(workdir: pathlib.Path, wanted: dict) -> None:
  checkpoint = find_checkpoint(workdir)
  checkpoint.restore(wanted, make_iterator())
  checkpoint.read_config()
  checkpoint.read_tokenizer()


@pytest.fixture
def check_refused(mesh_of) -> Callable[..., None]:
  """Checks the message, and that reading changes nothing on the disk."""
  mesh = mesh_of(1, 2, 1)

  def check(workdir: pathlib.Path, *parts: str, **changes: int | str) -> None:
    before = listing(workdir)
    with jax.set_mesh(mesh), pytest.raises(UserError) as error:
      read_all(workdir, abstract_state(mesh, **changes))
    message = str(error.value)
    assert message.startswith(str(workdir / 'checkpoints' / '7'))
    for part in parts:
      assert part in message, message
    assert '\n' not in message
    assert listing(workdir) == before

  return check


@pytest.mark.parametrize('damage', ['truncated', 'removed'])
@pytest.mark.parametrize(
  ('pattern', 'item'),
  [
    ('state/_METADATA', 'state'),
    ('state/manifest.ocdbt', 'state'),
    ('state/ocdbt.process_0/d/*', 'state'),
    ('data/process_0-of-1.json', 'data'),
    ('config/config.json', 'config'),
    ('tokenizer/tokenizer.json', 'tokenizer'),
    ('tokenizer/checksums.json', 'tokenizer'),
  ],
)
def test_a_damaged_file_is_refused(
  saved, tmp_path, check_refused, pattern, item, damage
):
  workdir = shutil.copytree(saved[0], tmp_path / 'copy')
  for path in (workdir / 'checkpoints' / '7').glob(pattern):
    content = path.read_bytes()
    path.unlink()
    if damage == 'truncated':
      path.write_bytes(content[: len(content) // 2])
  check_refused(workdir, f'the item {item} cannot be read: ')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('[]', 'is not a JSON object'),
    ('{"tokenizer.json": 1}', "'tokenizer.json' is 1, expected str"),
    ('{"../config/config.json": ""}', "'../config/config.json' is no file of"),
    ('{"..": ""}', 'a folder, expected a regular file'),
  ],
)
def test_checksums_name_files_of_the_item_alone(
  saved, tmp_path, check_refused, content, message
):
  workdir = shutil.copytree(saved[0], tmp_path / 'copy')
  item = workdir / 'checkpoints' / '7' / 'tokenizer'
  (item / 'checksums.json').write_text(content)
  check_refused(workdir, 'the item tokenizer cannot be read: ', message)


@pytest.mark.parametrize('item', ['state', 'data', 'config', 'tokenizer'])
def test_a_missing_item_is_named(saved, tmp_path, check_refused, item):
  workdir = shutil.copytree(saved[0], tmp_path / 'copy')
  shutil.rmtree(workdir / 'checkpoints' / '7' / item)
  check_refused(workdir, f'the item {item} is missing')


def test_a_relative_workdir_is_taken(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  state = {'step': jnp.zeros((), jnp.int32)}
  with Checkpoints('run', keep=1) as checkpoints:
    checkpoints.save(1, state, make_iterator(), CONFIG, TOKENIZER, {})
    checkpoints.wait()
    assert checkpoints.open(1).read_config() == CONFIG
  assert (tmp_path / 'run' / 'checkpoints' / '1').is_dir()


def test_what_is_no_checkpoint_is_refused_and_left_alone(saved, tmp_path):
  assert has_checkpoint(saved[0]) and not has_checkpoint(tmp_path)
  with pytest.raises(UserError, match='8 does not exist'):
    Checkpoint(saved[0] / 'checkpoints' / '8')
  with pytest.raises(UserError, match='nor the workdir of a run'):
    find_checkpoint(tmp_path)
  with pytest.raises(UserError, match='none does not exist'):
    find_checkpoint(tmp_path / 'none')
  assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_found_by_its_own_folder(saved):
  folder = saved[0] / 'checkpoints' / '7'
  assert find_checkpoint(folder).folder == find_checkpoint(saved[0]).folder


def test_arrays_are_read_slice_by_slice(saved):
  checkpoint = find_checkpoint(saved[0])
  expected = flatten(saved[1])
  types = checkpoint.types()
  assert {path: (x.shape, x.dtype) for path, x in types.items()} == {
    path: (x.shape, x.dtype) for path, x in expected.items()
  }
  for path in ('model/blocks/mlp/down', 'model/embed', 'step'):
    array = checkpoint.open_array(path)
    np.testing.assert_array_equal(array.read().result(), expected[path])
    if array.rank:
      part = array[1:2].read().result()
      np.testing.assert_array_equal(part, expected[path][1:2])


def test_layers_are_stored_apart_and_large_arrays_in_stretches(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(checkpoint_module, 'CHUNK_BYTES', 4096)
  layers = jnp.zeros((6, 8, 4), jnp.float32)
  table = jnp.zeros((1024, 8), jnp.float32)
  state = {'model': {'blocks': {'q': layers}, 'embed': table}}
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, make_iterator(), CONFIG, TOKENIZER, {})
  checkpoint = find_checkpoint(tmp_path)
  for path, shape in (
    ('model/blocks/q', (1, 8, 4)),
    ('model/embed', (128, 8)),
  ):
    assert checkpoint.open_array(path).chunk_layout.read_chunk.shape == shape


def test_another_shape_is_named_with_both(saved, check_refused):
  check_refused(
    saved[0],
    'model/blocks/mlp/down with shape (2, 48, 32)',
    'the model has it with shape (2, 96, 32)',
    mlp_dim=96,
  )


def test_another_dtype_is_named_with_both(saved, check_refused):
  check_refused(
    saved[0],
    'model/blocks/attention/k with dtype float32',
    'with dtype bfloat16',
    param_dtype='bfloat16',
  )


def test_an_array_that_only_the_model_has_is_named(saved, check_refused):
  check_refused(saved[0], 'has no model/projection', projection_dim=16)


def test_an_array_that_only_the_checkpoint_has_is_named(saved, check_refused):
  check_refused(
    saved[0],
    'model/head, which the model has not',
    tie_embeddings=True,
  )


def test_a_checkpoint_that_the_disk_refuses_names_the_last_good_one(tmp_path):
  rng = np.random.default_rng(0)
  state = {'x': jnp.asarray(rng.standard_normal((256, 256), np.float32))}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with pytest.raises(
    UserError,
    match=f'checkpoints: a checkpoint was not saved: File too large.* '
    f'last good one: {tmp_path}/checkpoints/1. The same command',
  ):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
      checkpoints.save(1, state, make_iterator(), {}, TOKENIZER, {})
      checkpoints.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
      try:
        checkpoints.save(2, state, make_iterator(), {}, TOKENIZER, {})
        checkpoints.wait()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest() == 1
    checkpoints.save(2, state, make_iterator(), {}, TOKENIZER, {})
    checkpoints.wait(2)
    with pytest.raises(UserError, match='has saved step 3, and the newest'):
      checkpoints.wait(3)


def test_a_run_that_has_lost_its_workdir_saves_nothing(tmp_path):
  def lost() -> None:
    raise UserError('lost')

  with Checkpoints(tmp_path, keep=2, check_lease=lost) as checkpoints:
    with pytest.raises(UserError, match='lost'):
      checkpoints.save(1, {}, make_iterator(), {}, TOKENIZER, {})
  assert not os.listdir(tmp_path / 'checkpoints')
