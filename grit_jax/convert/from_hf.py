"""A folder of Hugging Face into a checkpoint of ours."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from grit_jax.convert import keys
from grit_jax.convert.hf_folder import HfFolder
from grit_jax.convert.keys import Tensor
from grit_jax.convert.streamed import StreamedArray, write_checkpoint
from grit_jax.errors import UserError
from grit_jax.files import check_checksums
from grit_jax.models.decoder import count_parameters


def from_hf(source: epath.PathLike, target: epath.PathLike) -> None:
  """Converts a folder, one tensor at a time.

  The checkpoint keeps the SHA-256 of the folder's files.

  Args:
    source: The folder: config.json, safetensors, and a tokenizer.
    target: The checkpoint, which must not exist; local or gs://. It appears
      when it is whole.

  Raises:
    UserError: The folder is not one that can be converted.
    UserError: The target exists, or cannot be written.
  """
  check_checksums(pathlib.Path(source))
  folder = HfFolder(source)
  if not folder.has_head:
    raise UserError(
      f'{folder.path} has no head (lm_head.weight): it embeds as it is, and '
      'cannot become a checkpoint, which generates too.'
    )
  checksums = folder.checksums()
  slices: dict[str, list[Tensor]] = {}
  for tensor in folder.tensors:
    slices.setdefault(tensor.path, []).append(tensor)
  shapes = keys.weight_shapes(folder.model)
  dtype = np.dtype(folder.dtype)
  size = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
  with tqdm(total=size, unit='B', unit_scale=True, desc='weights') as bar:
    arrays = {
      path: StreamedArray(
        shape, dtype, partial(_read_parts, folder, slices[path], bar.update)
      )
      for path, shape in shapes.items()
    }
    write_checkpoint(
      target,
      arrays,
      dataclasses.asdict(folder.config),
      folder.tokenizer.files,
      checksums,
    )
  logging.info(
    '%s is written: %.3f billion weights in %s, %.2f GB.',
    target,
    count_parameters(folder.model) / 1e9,
    folder.dtype,
    size / 1e9,
  )


def _read_parts(
  folder: HfFolder, tensors: list[Tensor], report: Callable[[int], object]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """Yields the tensors that a weight is made of, each with its index."""
  for tensor in tensors:
    shape = keys.slice_shape(tensor, folder.model)
    part = folder.read(tensor, tuple(slice(0, length) for length in shape))
    yield tensor.index, part
    report(part.nbytes)
