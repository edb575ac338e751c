"""A checkpoint of adapters into a folder that PEFT loads on its base.

Names and layout are those of PEFT's LoRA: `lora_A.weight` is [R, I] and
`lora_B.weight` [O, R], a tensor a layer and, in a model with experts, an
expert, whatever the version of transformers makes of them.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from absl import logging
from etils import epath

from grit_jax.checkpoint import find_checkpoint
from grit_jax.convert import keys
from grit_jax.convert.keys import Tensor
from grit_jax.convert.safetensors_writer import (
  StreamedTensor,
  write_safetensors,
)
from grit_jax.convert.to_hf import check_target, to_bytes
from grit_jax.errors import UserError
from grit_jax.files import check_place, new_folder, write_file, writing
from grit_jax.initial import AdaptedModel
from grit_jax.models.lora import target_axes

WEIGHTS_FILE = 'adapter_model.safetensors'
CONFIG_FILE = 'adapter_config.json'
# Before the names of transformers' causal language models.
PREFIX = 'base_model.model.'


def to_peft(
  source: epath.PathLike, target: epath.PathLike, base: str = ''
) -> None:
  """Exports the adapters of a checkpoint.

  Args:
    source: The workdir of a run that trains adapters, for its newest
      checkpoint, or a checkpoint; local or gs://.
    target: A local folder that does not exist. It appears when it is whole.
    base: What PEFT is to take as their base, a folder or a name; empty: what
      the run had.

  Raises:
    UserError: The target exists or cannot be written, or the source has no
      adapters.
    UserError: The source is no checkpoint, or is damaged, or its base is
      not the one that it was.
  """
  folder = check_target(target)
  check_place(source)
  checkpoint = find_checkpoint(source)
  if not checkpoint.has_base():
    raise UserError(
      f'{checkpoint.folder} has no adapters: its run trained all weights. '
      'Export it with to_hf.'
    )
  adapted = AdaptedModel(checkpoint)
  checkpoint.verify()
  targets = target_axes(adapted.model, adapted.config.lora)
  tensors = [
    tensor for tensor in keys.tensors(adapted.model) if tensor.path in targets
  ]
  settings = _describe(adapted, tensors, base)
  with writing(folder), new_folder(folder) as partial_folder:
    write_safetensors(partial_folder / WEIGHTS_FILE, _stream(adapted, tensors))
    write_file(partial_folder / CONFIG_FILE, to_bytes(settings))
  logging.info(
    '%s is written: adapters of rank %d for %s.',
    folder,
    adapted.config.lora.rank,
    settings['base_model_name_or_path'],
  )


def _describe(
  adapted: AdaptedModel, tensors: list[Tensor], base: str
) -> dict[str, object]:
  """Returns what adapter_config.json has."""
  lora = adapted.config.lora
  named = adapted.adapters.read_base()['init_from']
  return {
    'base_model_name_or_path': base or named,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'lora_alpha': lora.alpha,
    'lora_dropout': lora.dropout,
    'peft_type': 'LORA',
    'r': lora.rank,
    'target_modules': sorted({_module(t).split('.')[-1] for t in tensors}),
    'task_type': 'CAUSAL_LM',
    'use_rslora': False,
  }


def _module(tensor: Tensor) -> str:
  """Returns the name of the module that has a weight."""
  return tensor.name.removesuffix('.weight')


def _stream(
  adapted: AdaptedModel, tensors: list[Tensor]
) -> dict[str, StreamedTensor]:
  rank = adapted.config.lora.rank
  streamed = {}
  for tensor in tensors:
    outputs, inputs = tensor.shape
    for factor, name, shape in (
      ('a', 'lora_A', (rank, inputs)),
      ('b', 'lora_B', (outputs, rank)),
    ):
      streamed[f'{PREFIX}{_module(tensor)}.{name}.weight'] = StreamedTensor(
        shape,
        np.dtype(np.float32),
        partial(_read, adapted.read_factor, tensor, factor),
      )
  return streamed


def _read(
  read_factor: Callable, tensor: Tensor, factor: str
) -> Iterator[np.ndarray]:
  leading = tuple(slice(i, i + 1) for i in tensor.index)
  value = read_factor(tensor.path, factor, leading)[(0,) * len(leading)]
  yield value.T if factor == 'a' else value
