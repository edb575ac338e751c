"""A folder of Hugging Face: its model, its tokenizer, and its weights in parts.

All of it is checked when the folder is opened, before a weight is read:
nothing is skipped, guessed or drawn at random.
"""

import dataclasses
import math
import pathlib
import re
from collections import Counter

import ml_dtypes
import numpy as np
from absl import logging
from etils import epath

from grit_jax import config as configuration
from grit_jax.config import (
  ARCHITECTURE,
  Config,
  Dtype,
  ModelConfig,
  RotaryScalingConfig,
)
from grit_jax.convert import hf_config, keys
from grit_jax.convert.keys import PROJECTION_FOLDER, Tensor
from grit_jax.convert.safetensors_reader import (
  INDEX_FILE,
  StoredTensor,
  find_tensors,
)
from grit_jax.data.tokenizer import TokenizerError, load_tokenizer
from grit_jax.errors import ConfigError, UserError
from grit_jax.files import (
  check_keys,
  hash_files,
  is_local,
  load_json,
  read_json,
)
from grit_jax.models.attention import rotary_frequencies

# Our exports have it: the run's whole configuration, as JSON.
RUN_FILE = 'grit_jax.json'
# sentence-transformers' list of what a folder is made of.
MODULES_FILE = 'modules.json'

# Bytes of a tensor that are read at once.
BLOCK_BYTES = 16 * 2**20
# Sides of the tile that is transposed at once, so that it stays in the cache.
TILE = (32, 4096)
# Lines of a message about many tensors.
MAX_PROBLEMS = 10
# Buffers of old folders may be rounded to bfloat16, of 8 bits.
BUFFER_TOLERANCE = 1e-2

_BUFFER = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
_HEAD = 'lm_head.weight'
_EMBED = 'model.embed_tokens.weight'


class HfFolder:
  """A local folder as transformers or sentence-transformers writes it.

  Attributes:
    path: The folder.
    model: The model, with `param_dtype` as `dtype` below; it computes in that
      too, unless it is an export of ours, which says in what.
    config: What a checkpoint of it says: the run's of an export of ours.
    tokenizer: The tokenizer.
    tensors: All tensors that are weights here.
    has_head: False for a model that was saved without one, to embed; it then
      counts as one of tied embeddings.
    dtype: Of all weights: bfloat16 where all of them are, else float32, to
      which float16 and bfloat16 widen without a loss.
  """

  def __init__(self, folder: epath.PathLike):
    """Opens and checks the folder.

    Raises:
      UserError: the folder is not what the converter knows to the last
        tensor; the message names what is wrong.
    """
    self.path = _local(folder)
    model, run = _read_model(self.path)
    stored = _add_prefix(find_tensors(self.path))
    self.has_head = not _is_headless(self.path, model, stored)
    if not self.has_head:
      # Nothing that embeds reads one.
      model = dataclasses.replace(model, tie_embeddings=True)
    _check_size(self.path, model, stored)
    _take_out_extras(self.path, model, stored)
    _check_names(self.path, keys.tensors(model), stored)
    if model.projection_dim:
      folder = self.path / PROJECTION_FOLDER
      projection = find_tensors(folder)
      _check_names(folder, keys.projection_tensors(model), projection)
      stored |= projection
    self._stored = stored
    self.dtype = _common_dtype(self.path, stored)
    self.tensors = [*keys.tensors(model), *keys.projection_tensors(model)]
    self.model = dataclasses.replace(model, param_dtype=self.dtype)
    if not (self.path / RUN_FILE).exists():
      self.model = dataclasses.replace(self.model, dtype=self.dtype)
    self.config = dataclasses.replace(run, model=self.model)
    try:
      self.tokenizer = load_tokenizer(self.path)
    except TokenizerError as error:
      raise UserError(str(error)) from error
    if self.tokenizer.vocab_size > model.vocab_size:
      raise UserError(
        f'{self.path}: the tokenizer has {self.tokenizer.vocab_size} ids, and '
        f'the model has vocab_size={model.vocab_size}.'
      )

  def checksums(self) -> dict[str, str]:
    """Returns the SHA-256 of each file that was read, by name."""
    names = {str(t.file.relative_to(self.path)) for t in self._stored.values()}
    for name in (
      hf_config.CONFIG_FILE, RUN_FILE, INDEX_FILE, MODULES_FILE,
      *self.tokenizer.files,
    ):  # fmt: skip
      if (self.path / name).exists():
        names.add(name)
    return hash_files(self.path, names)

  def read(self, tensor: Tensor, window: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of a weight, and of the disk what that needs.

    Args:
      tensor: One of `tensors`.
      window: A slice of step 1 an axis, of `keys.slice_shape`: transposed, and
        with the vocabulary padded.

    Returns:
      The part in `dtype`, contiguous, with zeros where the vocabulary is
      padded.

    Raises:
      UserError: a file cannot be read any more.
    """
    stored = self._stored[tensor.name]
    shape = keys.slice_shape(tensor, self.model)
    bounds = [
      range(*axis.indices(size))
      for axis, size in zip(window, shape, strict=True)
    ]
    part = np.empty([len(axis) for axis in bounds], self._numpy_dtype)
    theirs = part.T if tensor.transposed else part
    if tensor.transposed:
      bounds.reverse()
    rows, columns = bounds[0], [slice(b.start, b.stop) for b in bounds[1:]]
    # What lies behind the tensor's own rows is padding.
    end = min(rows.stop, stored.shape[0])
    theirs[max(end - rows.start, 0) :] = 0
    width = math.prod(len(axis) for axis in bounds[1:])
    step = max(BLOCK_BYTES // max(width * part.itemsize, 1), 1)
    for start in range(rows.start, end, step):
      stop = min(start + step, end)
      block = _widen(stored.read(slice(start, stop), *columns), part.dtype)
      _copy(block, theirs[start - rows.start : stop - rows.start])
    return part

  @property
  def _numpy_dtype(self) -> np.dtype:
    return np.dtype(
      ml_dtypes.bfloat16 if self.dtype == 'bfloat16' else np.float32
    )


def _local(folder: epath.PathLike) -> pathlib.Path:
  name = str(folder)
  if not is_local(name):
    raise UserError(
      f'{name}: safetensors reads local files alone. Copy the folder to a '
      'disk, or mount its bucket as one.'
    )
  path = pathlib.Path(name).absolute()
  if not path.is_dir():
    raise UserError(
      f'{path} is not a folder. A published model is fetched by '
      '"hf download NAME --local-dir FOLDER".'
    )
  return path


def _read_model(folder: pathlib.Path) -> tuple[ModelConfig, Config]:
  """Returns the model, and the configuration of its run or of none.

  Raises:
    UserError: what the folder's JSON files say is wrong, or contradictory.
  """
  config = hf_config.read_config(folder)
  where = str(folder / hf_config.CONFIG_FILE)
  projection = _read_projection(folder)
  path = folder / RUN_FILE
  if not path.exists():
    if projection is not None:
      raise UserError(
        f'{folder} has a projection ({PROJECTION_FOLDER}), but no {RUN_FILE} '
        'that says what it is of.'
      )
    return hf_config.to_model(config, where), Config()
  fields = read_json(path)
  try:
    run = configuration.from_dict(fields)
  except (ValueError, AttributeError, ConfigError) as error:
    raise UserError(
      f'{path} is not the configuration of a run: {error}'
    ) from error
  # The window of an export is one that it was trained with.
  window = config.pop('sliding_window', None) or 0
  model = hf_config.to_model({**config, 'sliding_window': None}, where)
  model = dataclasses.replace(model, sliding_window=window)
  for name in (*ARCHITECTURE, 'sliding_window'):
    if getattr(run.model, name) != getattr(model, name):
      raise UserError(
        f'{path} has model.{name}={getattr(run.model, name)!r}, but '
        f'{hf_config.CONFIG_FILE} makes it {getattr(model, name)!r}.'
      )
  found = None
  if run.model.projection_dim:
    found = (run.model.embed_dim, run.model.projection_dim)
  if projection != found:
    raise UserError(
      f'{path} has model.projection_dim={run.model.projection_dim}, but '
      f'{PROJECTION_FOLDER} is '
      + (f'{list(projection)}.' if projection else 'not there.')
    )
  return run.model, run


def _read_projection(folder: pathlib.Path) -> tuple[int, int] | None:
  """Returns the widths of sentence-transformers' Dense module; None: none.

  An export that sentence-transformers cannot compute has no list of modules,
  but a projection all the same.

  Raises:
    UserError: it is not the linear map that a projection is.
  """
  path = folder / MODULES_FILE
  if path.exists():
    modules = load_json(path)
    if not isinstance(modules, list):
      raise UserError(f'{path} is not a JSON list.')
    for number, module in enumerate(modules):
      check_keys(module, f'{path}: module {number}', path=str, type=str)
    names = [
      module['path'] for module in modules if module['type'].endswith('.Dense')
    ]
  else:
    names = [PROJECTION_FOLDER] * (folder / PROJECTION_FOLDER).is_dir()
  if not names:
    return None
  if names != [PROJECTION_FOLDER]:
    raise UserError(
      f'{path} has Dense modules at {", ".join(names)}; one at '
      f'{PROJECTION_FOLDER} can be converted.'
    )
  path = folder / PROJECTION_FOLDER / hf_config.CONFIG_FILE
  config = read_json(path, in_features=int, out_features=int)
  activation = str(config.get('activation_function'))
  if not activation.endswith('.Identity') or config.get('bias') is not True:
    raise UserError(
      f'{path}: activation_function={activation}, bias={config.get("bias")}: '
      'a projection is linear (Identity) with a bias.'
    )
  return config['in_features'], config['out_features']


def _add_prefix(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
  """Names tensors as a model with a head does, if one without was saved."""
  if any(name.startswith('model.') for name in stored):
    return stored
  return {
    name if name == _HEAD else f'model.{name}': tensor
    for name, tensor in stored.items()
  }


def _is_headless(
  folder: pathlib.Path, model: ModelConfig, stored: dict[str, StoredTensor]
) -> bool:
  """Whether a model was saved without a head, not with one that is lost."""
  named = hf_config.read_config(folder).get('architectures') or []
  return not (
    model.tie_embeddings
    or _HEAD in stored
    or (folder / RUN_FILE).exists()
    or any('ForCausalLM' in str(name) for name in named)
  )


def _check_size(
  folder: pathlib.Path, model: ModelConfig, stored: dict[str, StoredTensor]
) -> None:
  """Refuses a model of more layers than there are tensors.

  A table of a billion layers would take hours and all of the memory.
  """
  least = model.num_layers * max(model.num_experts, 1)
  if least > len(stored):
    raise UserError(
      f'{folder}: {hf_config.CONFIG_FILE} has '
      f'num_hidden_layers={model.num_layers}'
      + f' of {model.num_experts} experts each' * bool(model.num_experts)
      + f', and the files have {len(stored)} tensors in all.'
    )


def _take_out_extras(
  folder: pathlib.Path, model: ModelConfig, stored: dict[str, StoredTensor]
) -> None:
  """Removes tensors that other weights or the config already say.

  Raises:
    UserError: they say something else.
  """
  extras = [name for name in stored if _BUFFER.fullmatch(name)]
  for name in extras:
    _check_buffer(folder, model, stored[name])
  if model.tie_embeddings and _HEAD in stored and _EMBED in stored:
    if not _are_equal(stored[_HEAD], stored[_EMBED]):
      raise UserError(
        f'{folder}: tie_word_embeddings=True, but {_HEAD} is not {_EMBED}: '
        'the config contradicts the weights.'
      )
    extras.append(_HEAD)
  for name in extras:
    del stored[name]
  if extras:
    logging.info(
      '%s: %d tensors say what is known already, and are left out: %s.',
      folder,
      len(extras),
      ', '.join(extras[:3]) + ', ...' * (len(extras) > 3),
    )


def _check_buffer(
  folder: pathlib.Path, model: ModelConfig, stored: StoredTensor
) -> None:
  """Compares rotary frequencies that are stored with those of the config.

  Old versions of transformers scaled positions, not frequencies.
  """
  if stored.shape == (model.head_dim // 2,):
    values = stored.read(slice(None)).astype(np.float32)
    for scaling in (model.rotary_scaling, RotaryScalingConfig()):
      wanted = rotary_frequencies(model.head_dim, model.rope_theta, scaling)
      if np.allclose(values, wanted, rtol=BUFFER_TOLERANCE):
        return
  raise UserError(
    f'{folder}: {stored.name} is not what rope_theta={model.rope_theta} and '
    f'{model.rotary_scaling} give: the config contradicts the weights.'
  )


def _are_equal(first: StoredTensor, second: StoredTensor) -> bool:
  """Whether two tensors are bitwise equal."""
  if (first.shape, first.dtype) != (second.shape, second.dtype):
    return False
  rows = first.shape[0]
  step = max(BLOCK_BYTES // (first.shape[-1] * 4), 1)
  blocks = [
    slice(start, min(start + step, rows)) for start in range(0, rows, step)
  ]
  return all(
    np.array_equal(
      first.read(block).view(np.uint8), second.read(block).view(np.uint8)
    )
    for block in blocks
  )


def _check_names(
  folder: pathlib.Path, wanted: list[Tensor], stored: dict[str, StoredTensor]
) -> None:
  shapes = {name: tensor.shape for name, tensor in stored.items()}
  problems = keys.compare(wanted, shapes)
  if not problems:
    return
  lines = problems[:MAX_PROBLEMS]
  if len(problems) > len(lines):
    lines.append(f'... and {len(problems) - len(lines)} more')
  raise UserError(
    f'{folder}: the tensors are not those of {hf_config.CONFIG_FILE}:\n  '
    + '\n  '.join(lines)
  )


def _common_dtype(
  folder: pathlib.Path, stored: dict[str, StoredTensor]
) -> Dtype:
  counts = Counter(tensor.dtype for tensor in stored.values())
  if {*counts} == {'bfloat16'}:
    return 'bfloat16'
  if {*counts} == {'float32'}:
    return 'float32'
  logging.info(
    '%s: the tensors are %s; all become float32, which holds each value.',
    folder,
    ', '.join(f'{dtype} ({count})' for dtype, count in counts.items()),
  )
  return 'float32'


def _widen(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
  if block.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
    # A bfloat16 is the first half of a float32; twice as fast as a cast.
    return (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
  return block.astype(dtype, copy=False)


def _copy(block: np.ndarray, target: np.ndarray) -> None:
  """Copies [r, c] in tiles: numpy alone transposes four times slower."""
  # As whole numbers: numpy moves a dtype that is not its own one by one.
  bits = np.dtype(f'u{block.itemsize}')
  block, target = block.view(bits), target.view(bits)
  if block.ndim == 1 or target.flags.c_contiguous:
    target[...] = block
    return
  for row in range(0, block.shape[0], TILE[0]):
    for column in range(0, block.shape[1], TILE[1]):
      tile = np.s_[row : row + TILE[0], column : column + TILE[1]]
      target[tile] = block[tile]
