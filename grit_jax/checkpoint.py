"""Checkpoints: what a run needs to go on, and a model to be used elsewhere.

A step's folder, `{workdir}/checkpoints/{step}`, is complete in itself:

- `state`: model, optimizer state and step, as a nested dict of arrays whose
  keys are the names in the code (`model/blocks/attention/q`);
- `data`: the state of the data iterator;
- `config`: the run's configuration, JSON;
- `tokenizer`: the sentencepiece model.

Orbax writes it in the background into a temporary folder and renames that when
all of it is there, so a folder with a step's name is a whole checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

STATE, DATA, CONFIG, TOKENIZER = 'state', 'data', 'config', 'tokenizer'
CONFIG_FILE, TOKENIZER_FILE = 'config.json', 'tokenizer.model'


class CheckpointError(ValueError):
  """A checkpoint that cannot be read; the message names its path."""


class _FileHandler(ocp.CheckpointHandler):
  """An item that is one file of given bytes.

  With its checksum: half a sentencepiece model can be a model too.
  """

  def save(self, directory: epath.Path, args: '_FileSave') -> None:
    if jax.process_index() == 0:
      checksum = hashlib.sha256(args.content).hexdigest()
      (directory / args.name).write_bytes(args.content)
      (directory / f'{args.name}.sha256').write_text(checksum)

  def restore(self, directory: epath.Path, args: '_FileRestore') -> bytes:
    content = (directory / args.name).read_bytes()
    checksum = (directory / f'{args.name}.sha256').read_text()
    if hashlib.sha256(content).hexdigest() != checksum:
      raise ValueError(f'{args.name} is damaged: its checksum is another.')
    return content


@ocp.args.register_with_handler(_FileHandler, for_save=True)
@dataclasses.dataclass
class _FileSave(ocp.args.CheckpointArgs):
  name: str
  content: bytes


@ocp.args.register_with_handler(_FileHandler, for_restore=True)
@dataclasses.dataclass
class _FileRestore(ocp.args.CheckpointArgs):
  name: str


class Checkpoints:
  """The checkpoints of a run; a context manager that waits for them at its end.

  Starting one removes what a killed run left half written, so a folder has one
  writer. A reader takes `keep=0`: it creates, cleans and deletes nothing.
  """

  def __init__(self, workdir: epath.PathLike, keep: int):
    """Opens `{workdir}/checkpoints`, to keep the `keep` newest; 0: to read."""
    self._directory = epath.Path(workdir) / 'checkpoints'
    if not self._directory.is_absolute():
      self._directory = self._directory.absolute()
    if not keep and not self._directory.is_dir():
      raise CheckpointError(f'{self._directory} is not a folder.')
    self._manager = ocp.CheckpointManager(
      self._directory,
      item_handlers={
        STATE: ocp.PyTreeCheckpointHandler(),
        DATA: grain.checkpoint.CheckpointHandler(),
        CONFIG: ocp.JsonCheckpointHandler(CONFIG_FILE),
        TOKENIZER: _FileHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=(
          ocp.checkpoint_managers.LatestN(keep) if keep else None
        ),
        cleanup_tmp_directories=bool(keep),
        create=bool(keep),
        save_interval_steps=1 if keep else 0,
        read_only=not keep,
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Waits until what is being saved is there."""
    self._manager.close()

  def latest(self) -> int | None:
    """Returns the newest step that is saved, or being saved by this run."""
    return self._manager.latest_step()

  def path(self, step: int) -> epath.Path:
    """Returns the folder of a step's checkpoint."""
    return self._directory / str(step)

  def wait(self) -> None:
    """Waits until what is being saved is there; raises if it failed."""
    self._manager.wait_until_finished()

  def save(
    self,
    step: int,
    state: Any,
    data_iterator: grain.DatasetIterator,
    config: dict[str, Any],
    tokenizer: bytes,
  ) -> bool:
    """Starts to save, and returns when `state` may be donated.

    Args:
      step: names the checkpoint. One that exists is left as it is.
      state: a pytree of arrays.
      data_iterator: its state is taken before this returns.
      config: the configuration, as JSON has it.
      tokenizer: the sentencepiece model.

    Returns:
      Whether the checkpoint is new.
    """
    if step in self._manager.all_steps():
      return False
    return self._manager.save(
      step,
      args=ocp.args.Composite(
        **{
          STATE: ocp.args.PyTreeSave(_nest(state)),
          DATA: grain.checkpoint.CheckpointSave(data_iterator),
          CONFIG: ocp.args.JsonSave(config),
          TOKENIZER: _FileSave(TOKENIZER_FILE, tokenizer),
        }
      ),
      force=True,
    )

  def restore(
    self,
    step: int,
    abstract_state: Any,
    data_iterator: grain.DatasetIterator | None,
  ) -> Any:
    """Reads a checkpoint onto the current mesh, whichever mesh wrote it.

    Args:
      step: of a checkpoint that exists.
      abstract_state: what `jax.eval_shape` returns for the state, under the
        mesh. Its outermost entries can be some of the saved ones, as
        `{'model': ...}` for inference.
      data_iterator: gets its state set; None: the data's state is not read.

    Returns:
      The state, with the structure and the shardings of `abstract_state`.

    Raises:
      CheckpointError: the checkpoint lacks something, is damaged, or holds
        another model. Nothing is changed on the disk.
    """
    target = _nest(jax.tree.map(_on_current_mesh, abstract_state))
    self._check_arrays(step, target)
    with self._reading(step, STATE):
      arguments = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
      )
      state = self._restore_item(step, STATE, arguments)
    if data_iterator is not None:
      self._restore_data(step, data_iterator)
    return _unnest(state, abstract_state)

  def read_config(self, step: int) -> dict[str, Any]:
    """Returns the configuration that was saved."""
    with self._reading(step, CONFIG):
      return self._restore_item(step, CONFIG, ocp.args.JsonRestore())

  def read_tokenizer(self, step: int) -> bytes:
    """Returns the sentencepiece model that was saved."""
    with self._reading(step, TOKENIZER):
      arguments = _FileRestore(TOKENIZER_FILE)
      return self._restore_item(step, TOKENIZER, arguments)

  def _restore_item(self, step: int, item: str, arguments: Any) -> Any:
    return self._manager.restore(
      step, args=ocp.args.Composite(**{item: arguments})
    )[item]

  def _restore_data(self, step: int, iterator: grain.DatasetIterator) -> None:
    """Sets the iterator's state.

    Each process has written its own, all the same, as every process iterates
    over the same steps. Another number of processes takes the first's.
    """
    with self._reading(step, DATA):
      folder = self.path(step) / DATA
      own = f'process_{jax.process_index()}-of-{jax.process_count()}.json'
      first = sorted(folder.glob('process_0-of-*.json'))
      if first and not (folder / own).exists():
        iterator.set_state(json.loads(first[0].read_text()))
        return
      arguments = grain.checkpoint.CheckpointRestore(iterator)
      self._restore_item(step, DATA, arguments)

  @contextlib.contextmanager
  def _reading(self, step: int, item: str) -> Iterator[None]:
    """Turns what reading an item raises into an error that names it."""
    path = self.path(step)
    if not path.is_dir():
      steps = ', '.join(str(step) for step in self._manager.all_steps())
      raise CheckpointError(
        f'{path} does not exist. The checkpoints here: {steps or "none"}.'
      )
    if not (path / item).is_dir():
      raise CheckpointError(f'{path}: the item {item} is missing.')
    try:
      yield
    except Exception as error:
      # Orbax raises a bare Exception for an array whose data are damaged.
      if type(error) is not Exception and not isinstance(
        error, (ValueError, KeyError, OSError)
      ):
        raise
      raise CheckpointError(
        f'{path}: the item {item} cannot be read: '
        f'{_reason(error.__cause__ or error)}'
      ) from error

  def _check_arrays(self, step: int, target: dict[str, Any]) -> None:
    """Compares names, shapes and dtypes before anything is read.

    Orbax would cast to another dtype without a word.
    """
    with self._reading(step, STATE):
      handler = ocp.PyTreeCheckpointHandler()
      metadata = handler.metadata(self.path(step) / STATE)
    saved = {
      path: array
      for path, array in _flatten(metadata.tree).items()
      if path.partition('/')[0] in target
    }
    wanted = _flatten(target)
    where = f'{self.path(step)}: the item {STATE}'
    for path, array in wanted.items():
      if path not in saved:
        raise CheckpointError(f'{where} has no {path}, which the model has.')
      found = saved[path]
      for name, found_value, value in (
        ('shape', tuple(found.shape), tuple(array.shape)),
        ('dtype', str(found.dtype), str(array.dtype)),
      ):
        if found_value != value:
          raise CheckpointError(
            f'{where} has {path} with {name} {found_value}, and the model has '
            f'it with {name} {value}.'
          )
    for path in saved:
      if path not in wanted:
        raise CheckpointError(f'{where} has {path}, which the model has not.')


def _reason(error: BaseException) -> str:
  """Returns an error's first line, without TensorStore's dump of its state."""
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


def _flatten(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves by path, `model/blocks/attention/q`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {'/'.join(_names(path)): leaf for path, leaf in leaves}


def _nest(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves in dicts that are nested by name."""
  nested = {}
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
  leaves = _flatten(nested)
  paths, structure = jax.tree_util.tree_flatten_with_path(like)
  return jax.tree.unflatten(
    structure, [leaves['/'.join(_names(path))] for path, _ in paths]
  )
