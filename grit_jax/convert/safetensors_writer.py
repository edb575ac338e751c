"""Writes safetensors files a stretch of a tensor at a time.

The safetensors library wants all tensors of a file at once. The format is
plain: the header's length in 8 bytes, a JSON header padded with blanks to a
multiple of 8 bytes, and the tensors one after the other.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np

from grit_jax.files import new_file, write_json

DTYPES = {
  np.dtype(np.float32): 'F32',
  np.dtype(np.float16): 'F16',
  np.dtype(ml_dtypes.bfloat16): 'BF16',
}


@dataclasses.dataclass(frozen=True)
class StreamedTensor:
  """A tensor that is made while it is written.

  Attributes:
    shape: Of the whole tensor.
    dtype: Of all parts, one of `DTYPES`.
    parts: Called once; yields stretches of the tensor's first axis, in order.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  parts: Callable[[], Iterator[np.ndarray]]

  @property
  def size(self) -> int:
    """Bytes of the tensor."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(
  folder: pathlib.Path,
  tensors: Mapping[str, StreamedTensor],
  max_shard_bytes: int,
) -> None:
  """Writes tensors as a folder of Hugging Face has them.

  One file is `model.safetensors`; more are `model-00001-of-00002.safetensors`
  and so on, with an index of the names. The files are on the disk when this
  returns.

  Args:
    folder: Where to write.
    tensors: By name, in the order of the files.
    max_shard_bytes: Bytes of tensors in a file, at most; a larger tensor has a
      file of its own.

  Raises:
    OSError: The disk is full, or cannot be written.
    ValueError: A tensor's parts are not what its shape and dtype say.
  """
  shards = split_shards(tensors, max_shard_bytes)
  if len(shards) == 1:
    write_safetensors(folder / 'model.safetensors', tensors)
    return
  files: dict[str, str] = {}
  for number, names in enumerate(shards, start=1):
    file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    write_safetensors(folder / file, {name: tensors[name] for name in names})
    files |= dict.fromkeys(names, file)
  total = sum(tensor.size for tensor in tensors.values())
  index = {'metadata': {'total_size': total}, 'weight_map': files}
  write_json(folder / 'model.safetensors.index.json', index)


def split_shards(
  tensors: Mapping[str, StreamedTensor], max_shard_bytes: int
) -> list[list[str]]:
  """Returns the names of the tensors in each file, in their order."""
  shards: list[list[str]] = [[]]
  room = max_shard_bytes
  for name, tensor in tensors.items():
    if tensor.size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= tensor.size
  return shards


def write_safetensors(
  path: pathlib.Path, tensors: Mapping[str, StreamedTensor]
) -> None:
  """Writes one file, which is on the disk when this returns."""
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + tensor.size
    header[name] = {
      'dtype': DTYPES[np.dtype(tensor.dtype)],
      'shape': list(tensor.shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with new_file(path) as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name, tensor in tensors.items():
      _write_tensor(file, name, tensor)


def _write_tensor(file: IO, name: str, tensor: StreamedTensor) -> None:
  rows = 0
  for part in tensor.parts():
    if part.dtype != tensor.dtype or part.shape[1:] != tensor.shape[1:]:
      raise ValueError(
        f'{name}: a part is {part.dtype}{list(part.shape)}, of a tensor '
        f'{tensor.dtype}{list(tensor.shape)}.'
      )
    rows += len(part)
    # As bytes: numpy has no buffer of bfloat16.
    file.write(np.ascontiguousarray(part).view(np.uint8).data)
  if rows != tensor.shape[0]:
    raise ValueError(f'{name}: {rows} rows of {tensor.shape[0]} were given.')
