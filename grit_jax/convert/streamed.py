"""Writes a checkpoint a slice at a time, so that no array is ever whole."""

import asyncio
import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from grit_jax import checkpoint
from grit_jax.checksums import start_of, sum_part
from grit_jax.errors import UserError
from grit_jax.files import LockedError, check_place, hash_json, is_local, lock

# Of the item `fingerprints`: what a checkpoint was converted from.
SOURCE = 'source'


@dataclasses.dataclass
class StreamedArray:
  """An array that is made while it is written.

  Attributes:
    shape: Of the whole array.
    dtype: Of all parts.
    parts: Called once; yields each part with its index on the first axes. The
      indices are all of one length, and every part is given once.
    checksum: Of what is written so far.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  parts: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]
  checksum: int = 0


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
  """Writes a StreamedArray as Orbax writes a numpy array."""

  async def serialize(
    self,
    values: Sequence[StreamedArray],
    infos: Sequence[ocp.type_handlers.ParamInfo],
    args: object = None,
  ) -> list:
    """Writes all arrays before it returns, one part at a time."""
    del args
    for value, info in zip(values, infos, strict=True):
      await info.await_path_creation()
      await _write(value, epath.Path(info.parent_dir / info.name), info)
    return []


async def _write(
  value: StreamedArray, folder: epath.Path, info: ocp.type_handlers.ParamInfo
) -> None:
  store = None
  for index, part in value.parts():
    if store is None:
      store = _create(value, folder, len(index), info)
    writing = store[index].write(part)
    # Not awaited: after a Ctrl-C the event loop ends at once, and a write that
    # still goes on would complain. It may end between two parts.
    try:
      writing.result()
    except KeyboardInterrupt:
      # TensorStore goes on with it, and would make a removed folder anew.
      writing.result()
      raise
    value.checksum += sum_part(part, start_of(index, value.shape))
    await asyncio.sleep(0)


def _create(
  value: StreamedArray,
  folder: epath.Path,
  leading: int,
  info: ocp.type_handlers.ParamInfo,
) -> tensorstore.TensorStore:
  """Creates the file of an array, whose parts have `leading` axes less."""
  return tensorstore.open(
    {
      'driver': 'zarr',
      'kvstore': checkpoint.kvstore(folder),
      'metadata': {
        'shape': list(value.shape),
        'chunks': _chunk_shape(value, leading),
        'compressor': {'id': 'zstd', 'level': 1},
      },
      'dtype': value.dtype.name,
      # A weight of zeros is there, like any other.
      'store_data_equal_to_fill_value': True,
    },
    create=True,
    context=info.ts_context,
  ).result()


def _chunk_shape(value: StreamedArray, leading: int) -> list[int]:
  """Returns the chunks of a part: all of it, or equal stretches of rows."""
  part = value.shape[leading:]
  parts = -(-math.prod(part) * value.dtype.itemsize // checkpoint.CHUNK_BYTES)
  while part and part[0] % parts:
    parts += 1
  return [1] * leading + [part[0] // parts, *part[1:]]


def write_checkpoint(
  target: epath.PathLike,
  arrays: Mapping[str, StreamedArray],
  config: dict[str, Any],
  tokenizer: Mapping[str, bytes],
  checksums: Mapping[str, str] | None = None,
) -> None:
  """Writes a checkpoint that holds a model alone.

  Args:
    target: Its folder, which must not exist; local or gs://. It appears when
      all is written.
    arrays: The model's weights by path, `blocks/attention/q`.
    config: The configuration, as JSON has it.
    tokenizer: The tokenizer's files by name.
    checksums: Of the files that the model was converted from, by name.

  Raises:
    UserError: The target exists, or cannot be written. What was written
      is removed.
  """
  check_place(target)
  target = checkpoint.absolute(target)
  if target.exists():
    raise UserError(f'{target} exists: remove it, or name another.')
  model: dict[str, Any] = {}
  for path, array in arrays.items():
    *groups, name = path.split('/')
    inner = model
    for group in groups:
      inner = inner.setdefault(group, {})
    inner[name] = array
  registry = ocp.type_handlers.create_type_handler_registry(
    (StreamedArray, _StreamedHandler())
  )
  handler = ocp.CompositeCheckpointHandler(
    **{
      checkpoint.STATE: ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=registry
      ),
      checkpoint.CONFIG: ocp.JsonCheckpointHandler(checkpoint.CONFIG_FILE),
      checkpoint.TOKENIZER: checkpoint.FilesHandler(),
      checkpoint.FINGERPRINTS: checkpoint.FilesHandler(),
    }
  )
  items = {
    checkpoint.STATE: ocp.args.PyTreeSave({checkpoint.MODEL: model}),
    checkpoint.CONFIG: ocp.args.JsonSave(config),
    checkpoint.TOKENIZER: checkpoint.FilesSave(lambda: tokenizer),
    checkpoint.FINGERPRINTS: checkpoint.save_fingerprints(
      lambda: {
        checkpoint.CONFIG: hash_json(config),
        'arrays': {
          f'{checkpoint.MODEL}/{path}': array.checksum % 2**32
          for path, array in arrays.items()
        },
        SOURCE: dict(checksums or {}),
      }
    ),
  }
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _hold(target), ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(target, args=ocp.args.Composite(**items))
  except LockedError:
    raise
  except BaseException as error:
    for path in target.parent.glob(f'{target.name}.orbax-checkpoint-tmp*'):
      path.rmtree()
    if _is_of_the_disk(error):
      message = checkpoint.reason(error)
      raise UserError(f'{target} cannot be written: {message}') from error
    raise


@contextlib.contextmanager
def _hold(target: epath.Path) -> Iterator[None]:
  """Refuses a second writer, who would remove what the first one writes."""
  if not is_local(target):
    yield
    return
  held = target.with_name(f'.{target.name}.lock')
  with lock(pathlib.Path(held)):
    try:
      yield
    finally:
      held.unlink()


def _is_of_the_disk(error: BaseException) -> bool:
  """Whether the file system refused; TensorStore then raises a ValueError."""
  return isinstance(error, OSError) or (
    isinstance(error, ValueError) and 'os_error_code' in str(error)
  )
