"""Checkpoints: what a run needs to go on, and a model to be used elsewhere.

A checkpoint's folder is `{workdir}/checkpoints/{step}`, or one that was
converted. It holds:

- `state`: model, optimizer state and step, as a nested dict of arrays whose
  keys are the names in the code (`model/blocks/attention/q`); a converted one
  has the model alone; of a run that trains adapters, the model is those alone;
- `base`: the path and the fingerprint of what such adapters are for, JSON; not
  in others, which need nothing else;
- `data`: the state of the data iterator; not in a converted one;
- `config`: the run's configuration, JSON;
- `tokenizer`: the files of the tokenizer;
- `fingerprints`: checksums of the above, and what tells the tokenizer and the
  data of the run from others; of a converted one, its source's files, JSON.

Orbax writes it in the background into a temporary folder and renames that when
all of it is there, so a folder with a step's name is a whole checkpoint.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from grit_jax import processes
from grit_jax.checksums import start_of, sum_arrays, sum_part
from grit_jax.errors import UserError
from grit_jax.files import (
  CHECKSUMS,
  check_file,
  check_keys,
  hash_json,
  read_json,
)

STATE, DATA, CONFIG, TOKENIZER = 'state', 'data', 'config', 'tokenizer'
BASE = 'base'
FINGERPRINTS = 'fingerprints'
MODEL = 'model'
CONFIG_FILE = 'config.json'
_FINGERPRINTS_FILE = 'fingerprints.json'

# Bytes of an array that are compressed and read as one, at most. A layer is
# never in one with another: a conversion reads and writes layer by layer.
CHUNK_BYTES = 32 * 2**20

_DAMAGED = 'is damaged: its checksum is another.'


class FilesHandler(ocp.CheckpointHandler):
  """An item that is some files of given bytes.

  With their checksums: half a sentencepiece model can be a model too. They are
  written when all other items are, so they can say something of those.
  """

  def save(self, directory: epath.Path, args: 'FilesSave') -> None:
    """Remembers what to write."""
    del directory
    self._make_files = args.make_files

  def finalize(self, directory: epath.Path) -> None:
    """Writes the files."""
    if jax.process_index() == 0:
      checksums = {}
      for name, content in self._make_files().items():
        (directory / name).write_bytes(content)
        checksums[name] = hashlib.sha256(content).hexdigest()
      (directory / CHECKSUMS).write_text(json.dumps(checksums))

  def restore(
    self, directory: epath.Path, args: 'FilesRestore'
  ) -> dict[str, bytes]:
    """Reads the files by name."""
    del args
    files = {}
    path = directory / CHECKSUMS
    checksums = read_json(path)
    check_keys(checksums, str(path), **dict.fromkeys(checksums, str))
    for name, checksum in checksums.items():
      if os.path.basename(name) != name:
        raise ValueError(f'{name!r} is no file of it.')
      check_file(directory / name)
      files[name] = (directory / name).read_bytes()
      if hashlib.sha256(files[name]).hexdigest() != checksum:
        raise ValueError(f'{name} {_DAMAGED}')
    return files


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
  """What gives the files by name when the other items are written."""

  make_files: Callable[[], Mapping[str, bytes]]


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclasses.dataclass
class FilesRestore(ocp.args.CheckpointArgs):
  """All files are restored."""


def _handlers() -> dict[str, ocp.CheckpointHandler]:
  return {
    STATE: ocp.PyTreeCheckpointHandler(),
    DATA: grain.checkpoint.CheckpointHandler(),
    CONFIG: ocp.JsonCheckpointHandler(CONFIG_FILE),
    TOKENIZER: FilesHandler(),
    BASE: ocp.JsonCheckpointHandler(f'{BASE}.json'),
    FINGERPRINTS: FilesHandler(),
  }


class Checkpoint:
  """One checkpoint, to be read; nothing on the disk is changed."""

  def __init__(self, folder: epath.PathLike):
    """Opens a checkpoint's folder.

    Raises:
      UserError: there is no such folder, or it is not a checkpoint.
    """
    self.folder = absolute(folder)
    if not self.folder.is_dir():
      raise UserError(f'{self.folder} does not exist.')
    if not ocp.utils.is_checkpoint_finalized(self.folder):
      raise UserError(f'{self.folder} was not written to its end.')
    for item in (STATE, CONFIG, TOKENIZER, FINGERPRINTS):
      if not (self.folder / item).is_dir():
        raise UserError(f'{self.folder}: the item {item} is missing.')
    self._checkpointer = ocp.Checkpointer(
      ocp.CompositeCheckpointHandler(**_handlers())
    )

  def restore(
    self,
    abstract_state: Any,
    data_iterator: grain.DatasetIterator | None = None,
  ) -> Any:
    """Reads a state onto the current mesh, whichever mesh wrote it.

    Args:
      abstract_state: what `jax.eval_shape` returns for the state, under the
        mesh. Its outermost entries can be some of the saved ones, as
        `{'model': ...}` for inference.
      data_iterator: gets its state set; None: the data's state is not read.

    Returns:
      The state, with the structure and the shardings of `abstract_state`.

    Raises:
      UserError: the checkpoint lacks something, is damaged, or holds
        another model.
    """
    target = _nest(jax.tree.map(_on_current_mesh, abstract_state))
    self._check_arrays(target)
    with self._reading(STATE):
      arguments = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
      )
      state = self._restore_item(STATE, arguments)
    self._check_sums(sum_arrays(flatten(state)))
    if data_iterator is not None:
      self._restore_data(data_iterator)
    return _unnest(state, abstract_state)

  def read_config(self) -> dict[str, Any]:
    """Returns the configuration that was saved."""
    return self._read_json(CONFIG)

  @functools.cached_property
  def fingerprints(self) -> dict[str, Any]:
    """The item `fingerprints`, as it was saved."""
    with self._reading(FINGERPRINTS):
      files = self._restore_item(FINGERPRINTS, FilesRestore())
      return json.loads(files[_FINGERPRINTS_FILE])

  def verify(self) -> None:
    """Reads the model's arrays, and compares them with their checksums.

    For those who read parts of them; `restore` does it by itself. Of several
    processes each reads a share.

    Raises:
      UserError: one is damaged; the message names it.
    """
    shapes = {
      path: array.shape
      for path, array in self.types().items()
      if path.split('/')[0] == MODEL
    }
    own = [*shapes][jax.process_index() :: jax.process_count()]
    self._check_sums(
      {path: self._sum_stored(path, shapes[path]) for path in own}
    )

  def _sum_stored(self, path: str, shape: tuple[int, ...]) -> int:
    """Returns the checksum of an array as it is on the disk."""
    if not shape:
      return sum_part(self.read_array(path, ()), 0)
    # Far more than a chunk, of which one that is cut is read twice.
    row_bytes = 4 * math.prod(shape[1:])
    rows = max(8 * CHUNK_BYTES // max(row_bytes, 1), 1)
    total = 0
    for row in range(0, shape[0], rows):
      part = self.read_array(path, (slice(row, min(row + rows, shape[0])),))
      total += sum_part(part, start_of((row,), shape))
    return total % 2**32

  def _check_sums(self, sums: Mapping[str, Any]) -> None:
    wanted = self.fingerprints['arrays']
    for path, found in sums.items():
      if int(found) != wanted.get(path):
        raise UserError(f'{self.folder}: the item {STATE}: {path} {_DAMAGED}')

  def has_base(self) -> bool:
    """Whether the model is adapters, of a base that is elsewhere."""
    return (self.folder / BASE).is_dir()

  def read_base(self) -> dict[str, str]:
    """Returns `init_from` and `fingerprint` of what adapters are for."""
    return self._read_json(BASE)

  def read_tokenizer(self) -> dict[str, bytes]:
    """Returns the files of the tokenizer that was saved, by name."""
    with self._reading(TOKENIZER):
      return self._restore_item(TOKENIZER, FilesRestore())

  def types(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of all arrays, by path (`model/embed`)."""
    with self._reading(STATE):
      handler = ocp.PyTreeCheckpointHandler()
      metadata = handler.metadata(self.folder / STATE)
    return {
      path: jax.ShapeDtypeStruct(tuple(array.shape), array.dtype)
      for path, array in flatten(metadata.tree).items()
    }

  def read_array(self, path: str, index: tuple[int | slice, ...]) -> np.ndarray:
    """Reads a part of an array.

    Args:
      path: as in `types`.
      index: of its first axes.

    Raises:
      UserError: it cannot be read.
    """
    try:
      return np.asarray(self.open_array(path)[index].read().result())
    except ValueError as error:
      raise UserError(
        f'{self.folder}: {path} cannot be read: {reason(error)}'
      ) from error

  def open_array(self, path: str) -> tensorstore.TensorStore:
    """Opens an array by its path, to look at how it is stored."""
    name = path.replace('/', '.')
    folder = self.folder / STATE
    store: dict[str, Any] = kvstore(folder / name)
    if (folder / 'manifest.ocdbt').exists():
      base = kvstore(folder)
      store = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
    spec = {'driver': 'zarr', 'kvstore': store}
    return tensorstore.open(spec, open=True, read=True).result()

  def _restore_item(self, item: str, arguments: Any) -> Any:
    return self._checkpointer.restore(
      self.folder, args=ocp.args.Composite(**{item: arguments})
    )[item]

  def _read_json(self, item: str) -> dict[str, Any]:
    with self._reading(item):
      found = self._restore_item(item, ocp.args.JsonRestore())
      if hash_json(found) != self.fingerprints[item]:
        raise ValueError(_DAMAGED)
      return found

  def _restore_data(self, iterator: grain.DatasetIterator) -> None:
    """Sets the iterator's state.

    Each process has written its own, all the same, as every process iterates
    over the same steps; all read the first's.
    """
    with self._reading(DATA):
      [first] = (self.folder / DATA).glob('process_0-of-*.json')
      state = json.loads(first.read_text())
      if hash_json(state) != self.fingerprints[DATA]:
        raise ValueError(_DAMAGED)
      iterator.set_state(state)

  @contextlib.contextmanager
  def _reading(self, item: str) -> Iterator[None]:
    """Turns what reading an item raises into an error that names it."""
    if not (self.folder / item).is_dir():
      raise UserError(f'{self.folder}: the item {item} is missing.')
    try:
      yield
    except Exception as error:
      # Orbax raises a bare Exception for an array whose data are damaged.
      if type(error) is not Exception and not isinstance(
        error, (ValueError, KeyError, OSError)
      ):
        raise
      raise UserError(
        f'{self.folder}: the item {item} cannot be read: '
        f'{reason(error.__cause__ or error)}'
      ) from error

  def _check_arrays(self, target: dict[str, Any]) -> None:
    """Compares names, shapes and dtypes before anything is read.

    Orbax would cast to another dtype without a word.
    """
    saved = {
      path: array
      for path, array in self.types().items()
      if path.partition('/')[0] in target
    }
    wanted = flatten(target)
    where = f'{self.folder}: the item {STATE}'
    for path, array in wanted.items():
      if path not in saved:
        raise UserError(f'{where} has no {path}, which the model has.')
      found = saved[path]
      for name, found_value, value in (
        ('shape', found.shape, tuple(array.shape)),
        ('dtype', str(found.dtype), str(array.dtype)),
      ):
        if found_value != value:
          raise UserError(
            f'{where} has {path} with {name} {found_value}, and the model has '
            f'it with {name} {value}.'
          )
    for path in saved:
      if path not in wanted:
        raise UserError(f'{where} has {path}, which the model has not.')


class Checkpoints:
  """The checkpoints of a run; a context manager that waits for them at its end.

  Starting one removes what a killed run left half written, so a folder has one
  of them. To read, take `find_checkpoint`.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    keep: int,
    check_lease: Callable[[], None] = lambda: None,
  ):
    """Opens `{workdir}/checkpoints`, to keep the `keep` newest.

    Args:
      workdir: of the run.
      keep: checkpoints that are kept.
      check_lease: raises if another run has taken the workdir over.
    """
    self.check_lease = check_lease
    self._has_failed = False
    self._directory = absolute(workdir) / 'checkpoints'
    self._manager = ocp.CheckpointManager(
      self._directory,
      item_handlers=_handlers(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
        save_interval_steps=1,
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Waits until what is being saved is there, unless saving has failed."""
    if not self._has_failed:
      self._manager.close()

  def latest(self) -> int | None:
    """Returns the newest step that is saved, or being saved by this run."""
    return self._manager.latest_step()

  def path(self, step: int) -> epath.Path:
    """Returns the folder of a step's checkpoint."""
    return self._directory / str(step)

  def open(self, step: int) -> Checkpoint:
    """Returns a step's checkpoint, to be read.

    Raises:
      UserError: there is none, or it is not whole.
    """
    return Checkpoint(self.path(step))

  def wait(self, step: int = 0) -> None:
    """Waits until what is being saved is there.

    Args:
      step: that the newest checkpoint must be of; 0: of any.

    Raises:
      UserError: it failed, or the newest checkpoint is another run's.
    """
    with self._saving():
      self._manager.wait_until_finished()
    found = max(_steps(self._directory.parent), default=0)
    if step and processes.is_first() and found != step:
      raise UserError(
        f'{self._directory}: this run has saved step {step}, and the newest '
        f'checkpoint is of step {found}: another run writes here, or has '
        'removed it.'
      )

  def save(
    self,
    step: int,
    state: Any,
    data_iterator: grain.DatasetIterator,
    config: dict[str, Any],
    tokenizer: Mapping[str, bytes],
    run: dict[str, Any],
    base: dict[str, str] | None = None,
  ) -> bool:
    """Starts to save, and returns when `state` may be donated.

    Args:
      step: names the checkpoint. One that exists is left as it is.
      state: a pytree of arrays.
      data_iterator: its state is taken before this returns.
      config: the configuration, as JSON has it.
      tokenizer: the tokenizer's files.
      run: what tells tokenizer and data from others, as JSON has it; the next
        start compares it.
      base: of a run that trains adapters, what `Checkpoint.read_base` returns.

    Returns:
      Whether the checkpoint is new.
    """
    if step in self._manager.all_steps():
      return False
    self.check_lease()
    nested = _nest(state)
    fingerprints = {
      'run': run,
      CONFIG: hash_json(config),
      DATA: hash_json(data_iterator.get_state()),
      'arrays': jax.tree.map(int, sum_arrays(flatten(nested))),
    }
    more = {}
    if base is not None:
      more[BASE] = ocp.args.JsonSave(base)
      fingerprints[BASE] = hash_json(base)
    items = ocp.args.Composite(
      **{
        STATE: ocp.args.PyTreeSave(nested, save_args=_chunks(nested)),
        DATA: grain.checkpoint.CheckpointSave(data_iterator),
        CONFIG: ocp.args.JsonSave(config),
        TOKENIZER: FilesSave(lambda: tokenizer),
        FINGERPRINTS: save_fingerprints(lambda: fingerprints),
        **more,
      }
    )
    # It waits for the one before, and raises if that failed.
    with self._saving():
      return self._manager.save(step, args=items, force=True)

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    """Turns what saving raises into an error that says what is whole."""
    try:
      yield
    except (ValueError, OSError) as error:
      self._has_failed = True
      steps = _steps(self._directory.parent)
      good = self.path(max(steps)) if steps else 'none'
      raise UserError(
        f'{self._directory}: a checkpoint was not saved: {reason(error)}. The '
        f'last good one: {good}. The same command goes on from it.'
      ) from error


def save_fingerprints(make: Callable[[], dict[str, Any]]) -> FilesSave:
  """Returns how the item `fingerprints` is saved."""
  return FilesSave(
    lambda: {_FINGERPRINTS_FILE: json.dumps(make(), indent=2).encode()}
  )


def find_checkpoint(path: epath.PathLike) -> Checkpoint:
  """Opens a checkpoint by its own folder, or a run's newest by its workdir.

  Raises:
    UserError: there is none; the message says what was looked for.
  """
  folder = absolute(path)
  if not folder.is_dir():
    raise UserError(f'{folder} does not exist.')
  if (folder / STATE).is_dir():
    return Checkpoint(folder)
  steps = _steps(folder)
  if not steps:
    raise UserError(
      f'{folder} is neither a checkpoint (a folder with {STATE}/) nor the '
      'workdir of a run that has saved one (checkpoints/STEP/).'
    )
  return Checkpoint(folder / 'checkpoints' / str(max(steps)))


def has_checkpoint(workdir: epath.PathLike) -> bool:
  """Whether a run has saved a checkpoint."""
  return bool(_steps(absolute(workdir)))


def _steps(workdir: epath.Path) -> list[int]:
  """Returns the steps of a run's checkpoints that are whole."""
  folder = workdir / 'checkpoints'
  return ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns a path that does not depend on the current folder."""
  path = epath.Path(path)
  return path if path.is_absolute() else path.absolute()


def kvstore(folder: epath.Path) -> dict[str, str]:
  """Returns TensorStore's name of a folder, local or gs://."""
  path = str(folder)
  if path.startswith('gs://'):
    bucket, _, prefix = path.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': f'{prefix}/'}
  return {'driver': 'file', 'path': f'{path}/'}


def _chunks(nested: dict[str, Any]) -> dict[str, Any]:
  """Returns how each array is split into chunks: by layer, then by size."""

  def choose(path: tuple, _: Any) -> ocp.SaveArgs:
    layered = any(getattr(key, 'key', None) == 'blocks' for key in path)
    return ocp.SaveArgs(
      chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if layered else ()
    )

  return jax.tree_util.tree_map_with_path(choose, nested)


def reason(error: BaseException) -> str:
  """Returns what the system says, or an error's first line.

  Without TensorStore's dump of its state.
  """
  if code := re.search("os_error_code='([0-9]+)'", str(error)):
    return os.strerror(int(code[1]))
  lines = str(error).partition(' [tensorstore_spec=')[0].strip().splitlines()
  return lines[0] if lines else type(error).__name__


def _on_current_mesh(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Puts an array's type on devices; `eval_shape` leaves the mesh abstract."""
  mesh, sharding = jax.sharding.get_mesh(), x.sharding
  if sharding is None:
    sharding = (
      SingleDeviceSharding(jax.devices()[0])
      if mesh.empty
      else NamedSharding(mesh, P())
    )
  elif isinstance(sharding.mesh, AbstractMesh):
    sharding = NamedSharding(mesh, sharding.spec)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _names(path: tuple) -> list[str]:
  """Returns a leaf's path as in the code, without nnx.Param's own `value`."""
  names = [jax.tree_util.keystr((key,), simple=True) for key in path]
  if len(names) > 1 and names[-1] == 'value':
    names.pop()
  return names


def flatten(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves by path, `model/blocks/attention/q`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {'/'.join(_names(path)): leaf for path, leaf in leaves}


def _nest(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves in dicts that are nested by name."""
  nested: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *groups, name = _names(path)
    inner = nested
    for group in groups:
      inner = inner.setdefault(group, {})
    if name in inner:
      raise ValueError(f'Two arrays have the path {"/".join(_names(path))}.')
    inner[name] = leaf
  return nested


def _unnest(nested: dict[str, Any], like: Any) -> Any:
  """Undoes `_nest` for a tree of the structure of `like`."""
  leaves = flatten(nested)
  paths, structure = jax.tree_util.tree_flatten_with_path(like)
  return jax.tree.unflatten(
    structure, [leaves['/'.join(_names(path))] for path, _ in paths]
  )
