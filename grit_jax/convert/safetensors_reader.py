"""Reads a folder's safetensors files, a part of a tensor at a time."""

import dataclasses
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open

from grit_jax.errors import UserError
from grit_jax.files import check_file, check_keys, read_json

ONE_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}

_PYTORCH_SUFFIXES = ('.bin', '.pth', '.pt', '.ckpt')
_LFS_POINTER = b'version https://git-lfs'


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file.

  Attributes:
    name: Its name there.
    file: The file.
    dtype: Its dtype's name in numpy: float32, bfloat16 or float16.
    shape: Its shape.
  """

  name: str
  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]

  def read(self, *window: slice) -> np.ndarray:
    """Reads a part, a slice an axis, in `dtype`.

    The file is opened anew: the pages of a mapped file count as this process's
    memory for as long as it is open.

    Raises:
      UserError: the file cannot be read any more.
    """
    try:
      with safe_open(self.file, 'numpy') as file:
        return file.get_slice(self.name)[window]
    except (OSError, SafetensorError) as error:
      raise UserError(f'{self.file} cannot be read: {error}') from error


def find_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
  """Returns all tensors of a folder by name; reads the files' headers alone.

  Args:
    folder: has `model.safetensors`, or `model.safetensors.index.json` and the
      files that it names.

  Raises:
    UserError: there are none, a file is damaged or of another dtype, or the
      index contradicts the files.
  """
  one_file, index_file = folder / ONE_FILE, folder / INDEX_FILE
  if one_file.exists() and index_file.exists():
    raise UserError(
      f'{folder} has both {ONE_FILE} and {INDEX_FILE}: remove one of them.'
    )
  if one_file.exists():
    return {tensor.name: tensor for tensor in _read_header(one_file)}
  if not index_file.exists():
    raise UserError(f'{folder} has no {ONE_FILE}{_explain(folder)}.')
  files = _read_index(index_file)
  tensors: dict[str, StoredTensor] = {}
  for file in sorted(set(files.values())):
    for tensor in _read_header(folder / file):
      if tensor.name in tensors:
        raise UserError(
          f'{folder}: {tensor.name} is in two files, '
          f'{tensors[tensor.name].file.name} and {file}.'
        )
      tensors[tensor.name] = tensor
  _check_index(index_file, files, tensors)
  return tensors


def _explain(folder: pathlib.Path) -> str:
  """Returns what else there is: PyTorch's own files, which are not read."""
  names = [
    path.name
    for path in sorted(folder.iterdir())
    if path.suffix in _PYTORCH_SUFFIXES
  ]
  if not names:
    return f' and no {INDEX_FILE}'
  return (
    f', but {names[0]}, which PyTorch alone reads safely. Write safetensors '
    'with transformers: AutoModelForCausalLM.from_pretrained(FOLDER, '
    'dtype="auto").save_pretrained(NEW_FOLDER), and copy the tokenizer there'
  )


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """Returns the file of each tensor.

  Raises:
    UserError: it is no index, or names a file that is not in the folder.
  """
  files = read_json(path, weight_map=dict)['weight_map']
  check_keys(files, f'{path}: weight_map', **dict.fromkeys(files, str))
  names = sorted(set(files.values()))
  present = {file.name for file in path.parent.iterdir()}
  missing = [name for name in names if name not in present]
  if missing:
    raise UserError(
      f'{path} names {len(names)} files, of which {len(missing)} are not in '
      f'the folder: {", ".join(missing[:3])}{", ..." * (len(missing) > 3)}.'
    )
  return files


def _check_index(
  path: pathlib.Path, files: dict[str, str], tensors: dict[str, StoredTensor]
) -> None:
  for name, file in files.items():
    if name not in tensors or tensors[name].file.name != file:
      raise UserError(f'{path}: {name} is not in {file}.')
  for name, tensor in tensors.items():
    if name not in files:
      raise UserError(f'{path} lacks {name}, which {tensor.file.name} has.')


def _read_header(path: pathlib.Path) -> list[StoredTensor]:
  """Returns the tensors of a file.

  safetensors checks that they fill the file to its last byte.

  Raises:
    UserError: the file is damaged, or has another dtype.
  """
  tensors = []
  check_file(path)
  try:
    with safe_open(path, 'numpy') as file:
      for name in file.keys():  # noqa: SIM118 (it is no dict)
        part = file.get_slice(name)
        if part.get_dtype() not in DTYPES:
          raise UserError(
            f'{path}: {name} is of dtype {part.get_dtype()}, not one of '
            f'{", ".join(DTYPES)}.'
          )
        tensors.append(
          StoredTensor(
            name, path, DTYPES[part.get_dtype()], tuple(part.get_shape())
          )
        )
  except (OSError, SafetensorError) as error:
    reason = f'it is damaged, or was not copied to its end ({error})'
    if _begins_with(path, _LFS_POINTER):
      reason = 'it is a pointer of Git LFS: "git lfs pull" fetches the file'
    raise UserError(f'{path} cannot be read: {reason}.') from error
  return tensors


def _begins_with(path: pathlib.Path, content: bytes) -> bool:
  if not path.is_file():
    return False
  with open(path, 'rb') as file:
    return file.read(len(content)) == content
