"""A checkpoint of ours into a folder that other tools load as it is.

transformers, sentence-transformers, PyTorch gritlm and others read one folder:
config.json and the weights in safetensors, under transformers' names; the
tokenizer as a tokenizer.json; sentence-transformers' modules. Every file is
written here: what transformers 5 writes, version 4 reads otherwise.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from absl import logging
from etils import epath
from tqdm import tqdm

from grit_jax import config as configuration
from grit_jax.checkpoint import MODEL, Checkpoint, find_checkpoint
from grit_jax.config import Config, LoraConfig, ModelConfig
from grit_jax.convert import hf_config, keys
from grit_jax.convert.chat_template import chat_template
from grit_jax.convert.hf_folder import RUN_FILE
from grit_jax.convert.keys import PROJECTION_FOLDER, Tensor
from grit_jax.convert.model_card import write_card
from grit_jax.convert.safetensors_writer import (
  StreamedTensor,
  write_tensors,
)
from grit_jax.convert.sentence_transformers import (
  describe_modules,
  describe_projection,
  find_obstacle,
)
from grit_jax.convert.tokenizer_files import tokenizer_json
from grit_jax.data.tokenizer import (
  CONFIG_FILE,
  JSON_FILE,
  SENTENCEPIECE_FILE,
  Tokenizer,
  make_tokenizer,
)
from grit_jax.errors import UserError
from grit_jax.files import (
  check_place,
  is_local,
  new_folder,
  write_checksums,
  write_file,
  writing,
)
from grit_jax.initial import AdaptedModel, check_size

DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
}
STORED_DTYPES = ('float32', 'bfloat16')
MAX_SHARD_BYTES = 5 * 10**9

# Rows of a tensor that are cast and written at once, and columns of those that
# are transposed at once: a tile that stays in the cache.
STRETCH = 512
CARD = 'README.md'
TILE = 32


def to_hf(
  source: epath.PathLike,
  target: epath.PathLike,
  dtype: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Exports a checkpoint.

  Args:
    source: A run's workdir, for its newest checkpoint, or a checkpoint; local
      or gs://. One of adapters is exported with its base, merged.
    target: A local folder that does not exist. It appears when it is whole.
    dtype: One of `DTYPES` for the weights; None: as they are stored.
    max_shard_bytes: Bytes of weights in a file, at most.

  Raises:
    UserError: The target exists or cannot be written; the checkpoint's
      weights are not those of its configuration, or not finite in `dtype`.
    UserError: The source is no checkpoint, or is damaged.
    ConfigError: Its configuration is not one.
    TokenizerError: Its tokenizer cannot be written.
  """
  folder = check_target(target)
  check_place(source)
  checkpoint = find_checkpoint(source)
  values = checkpoint.read_config()
  config = configuration.from_dict(values)
  tokenizer = _read_tokenizer(checkpoint, config.model)
  if checkpoint.has_base():
    merged = AdaptedModel(checkpoint)
    merged.verify()
    read, stored = partial(_read_merged, merged), merged.dtype
    # What is written has no adapters any more.
    values = values | {'lora': dataclasses.asdict(LoraConfig())}
  else:
    read, stored = (
      partial(_read_stored, checkpoint),
      _check_arrays(checkpoint, config.model),
    )
    checkpoint.verify()
  dtype = dtype or stored
  files = {
    **_describe_model(config, tokenizer, dtype),
    **_describe_tokenizer(config, tokenizer),
    RUN_FILE: values,
    CARD: write_card(config, tokenizer, dtype, folder.name),
  }
  with writing(folder), new_folder(folder) as partial_folder:
    _write_weights(read, config, DTYPES[dtype], max_shard_bytes, partial_folder)
    for name, content in files.items():
      path = partial_folder / name
      path.parent.mkdir(exist_ok=True)
      write_file(path, to_bytes(content))
    write_checksums(partial_folder, but=CARD)
  logging.info(
    '%s is written, in %s. Its README.md says how to load it with '
    'transformers, sentence-transformers and others.',
    folder,
    dtype,
  )


def check_target(target: epath.PathLike) -> pathlib.Path:
  """Returns the path of a local folder that does not exist, or raises."""
  if not is_local(target):
    raise UserError(
      f'{target} is not a local folder. Write to a disk, and copy from there.'
    )
  check_place(target)
  folder = pathlib.Path(os.path.abspath(target))
  if os.path.lexists(folder):
    raise UserError(f'{folder} exists: remove it, or name another.')
  return folder


def _read_tokenizer(checkpoint: Checkpoint, model: ModelConfig) -> Tokenizer:
  tokenizer = make_tokenizer(
    checkpoint.read_tokenizer(), f'{checkpoint.folder}/tokenizer'
  )
  if tokenizer.vocab_size > model.vocab_size:
    raise UserError(
      f'{checkpoint.folder}: the tokenizer has {tokenizer.vocab_size} ids, and '
      f'the model has vocab_size={model.vocab_size}.'
    )
  return tokenizer


def _check_arrays(checkpoint: Checkpoint, model: ModelConfig) -> str:
  """Compares the checkpoint's weights with the model; returns their dtype."""
  check_size(checkpoint, model)
  prefix = f'{MODEL}/'
  found = {
    path.removeprefix(prefix): array
    for path, array in checkpoint.types().items()
    if path.startswith(prefix)
  }
  wanted = keys.weight_shapes(model)
  problems = [f'{path} is missing' for path in wanted if path not in found]
  for path, array in found.items():
    if path not in wanted:
      problems.append(f'{path} {list(array.shape)} is not known')
    elif array.shape != wanted[path]:
      problems.append(
        f'{path} is {list(array.shape)}, but the configuration makes it '
        f'{list(wanted[path])}'
      )
  dtypes = sorted({str(array.dtype) for array in found.values()})
  if not problems and len(dtypes) > 1:
    problems.append(f'there are several dtypes: {", ".join(dtypes)}')
  elif not problems and dtypes[0] not in STORED_DTYPES:
    problems.append(
      f'their dtype is {dtypes[0]}, not one of {", ".join(STORED_DTYPES)}'
    )
  if problems:
    raise UserError(
      f'{checkpoint.folder}: the weights are not those of its configuration:'
      + ''.join(f'\n  {problem}' for problem in problems)
    )
  return dtypes[0]


def _read_stored(checkpoint: Checkpoint, tensor: Tensor) -> np.ndarray:
  return checkpoint.read_array(f'{MODEL}/{tensor.path}', tensor.index)


def _read_merged(merged: AdaptedModel, tensor: Tensor) -> np.ndarray:
  shape = keys.slice_shape(tensor, merged.model)
  index = [slice(i, i + 1) for i in tensor.index]
  index += [slice(0, size) for size in shape]
  part = merged.read(tensor.path, tuple(index), DTYPES[merged.dtype])
  return part.reshape(shape)


def _write_weights(
  read: Callable[[Tensor], np.ndarray],
  config: Config,
  dtype: np.dtype,
  max_shard_bytes: int,
  folder: pathlib.Path,
) -> None:
  """Writes the decoder's weights and, if it has one, the projection's."""
  model = config.model
  with tqdm(unit='B', unit_scale=True, desc='weights') as bar:

    def stream(tensors: list[Tensor]) -> dict[str, StreamedTensor]:
      return {
        tensor.name: StreamedTensor(
          tensor.shape,
          dtype,
          partial(_read_parts, tensor, read, dtype, bar.update),
        )
        for tensor in tensors
      }

    decoder = stream(keys.tensors(model))
    projection = stream(keys.projection_tensors(model))
    bar.total = sum(t.size for t in [*decoder.values(), *projection.values()])
    write_tensors(folder, decoder, max_shard_bytes)
    # Where sentence-transformers has no place for it, from_hf still has one.
    if projection:
      (folder / PROJECTION_FOLDER).mkdir()
      write_tensors(folder / PROJECTION_FOLDER, projection, max_shard_bytes)


def _read_parts(
  tensor: Tensor,
  read: Callable[[Tensor], np.ndarray],
  dtype: np.dtype,
  report: Callable[[int], Any],
) -> Iterator[np.ndarray]:
  """Yields stretches of a tensor's rows, cast to `dtype`.

  A slice is read whole: what it is compressed in may hold some of each row.
  """
  values = read(tensor)
  for start in range(0, tensor.shape[0], STRETCH):
    stop = min(start + STRETCH, tensor.shape[0])
    if tensor.transposed:
      part = _transpose(values[:, start:stop])
    else:
      part = values[start:stop]
    part = _cast(part, dtype, tensor)
    yield part
    report(part.nbytes)


def _transpose(columns: np.ndarray) -> np.ndarray:
  """Returns [W, I] of [I, W]; numpy alone takes three times as long."""
  # As whole numbers: numpy moves a dtype that is not its own one by one.
  bits = columns.view(f'u{columns.itemsize}')
  rows = np.empty(bits.shape[::-1], bits.dtype)
  for start in range(0, len(bits), TILE):
    rows[:, start : start + TILE] = bits[start : start + TILE].T
  return rows.view(columns.dtype)


def _cast(part: np.ndarray, dtype: np.dtype, tensor: Tensor) -> np.ndarray:
  if not np.isfinite(part).all():
    raise UserError(
      f'{tensor.path} ({tensor.name}) holds values that are not finite.'
    )
  if part.dtype == dtype:
    return part
  with np.errstate(over='ignore'):
    cast = part.astype(dtype)
  if not np.isfinite(cast).all():
    raise UserError(
      f'{tensor.path} ({tensor.name}) holds values beyond the range of '
      f'{dtype.name}. float32 holds all.'
    )
  return cast


def _describe_model(
  config: Config, tokenizer: Tokenizer, dtype: str
) -> dict[str, Any]:
  """Returns the files that say what the model is, by name."""
  model = config.model
  files = {
    hf_config.CONFIG_FILE: hf_config.from_model(
      model, dtype, tokenizer.bos, tokenizer.eos
    )
  }
  if config.objective.has_generative:
    files['generation_config.json'] = {
      'bos_token_id': tokenizer.bos,
      'do_sample': False,
      'eos_token_id': tokenizer.eos,
      'pad_token_id': tokenizer.eos,
    }
  if not find_obstacle(config):
    files |= describe_modules(model)
  if model.projection_dim:
    files |= describe_projection(model)
  return files


def _describe_tokenizer(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns the tokenizer's files by name."""
  written = tokenizer_json(tokenizer)
  # Padding is EOS, as in the reference: it is masked wherever a batch has any.
  special: dict[str, str | None] = {
    'bos_token': tokenizer.bos_piece,
    'eos_token': tokenizer.eos_piece,
    'pad_token': tokenizer.eos_piece,
  }
  if tokenizer.unk is not None:
    library = tokenizers.Tokenizer.from_buffer(written)
    special['unk_token'] = library.id_to_token(tokenizer.unk)
  settings = {
    **special,
    'clean_up_tokenization_spaces': False,
    # The decoder takes no others, such as token_type_ids.
    'model_input_names': ['input_ids', 'attention_mask'],
    'model_max_length': config.model.max_positions,
    'padding_side': 'right',
    'tokenizer_class': 'PreTrainedTokenizerFast',
  }
  if config.objective.has_generative:
    settings['chat_template'] = chat_template(tokenizer)
  files = {
    JSON_FILE: written,
    CONFIG_FILE: settings,
    'special_tokens_map.json': special,
  }
  if SENTENCEPIECE_FILE in tokenizer.files:
    files[SENTENCEPIECE_FILE] = tokenizer.files[SENTENCEPIECE_FILE]
  return files


def to_bytes(content: Any) -> bytes:
  """Returns a file's content: bytes as they are, a text, or JSON."""
  if isinstance(content, bytes):
    return content
  if not isinstance(content, str):
    content = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
  return content.encode()
