"""Small Hugging Face folders, with random weights and a true tokenizer."""

import argparse
import dataclasses
import inspect
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from grit_jax.config import Config
from grit_jax.convert import hf_config, keys
from grit_jax.convert.streamed import StreamedArray, write_checkpoint
from grit_jax.data.tokenizer import SENTENCEPIECE_FILE
from grit_jax.data.tokenizer_training import train_tokenizer

# Every size is odd where it may be; the vocabulary has more ids than the
# tokenizer, and less than the padded table.
PIECES = 400
LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 407,
  'hidden_size': 36,
  'intermediate_size': 52,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'num_key_value_heads': 1,
  'head_dim': 10,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500.0,
  'max_position_embeddings': 512,
  'tie_word_embeddings': False,
}
DTYPES = {
  'float32': np.float32,
  'float16': np.float16,
  'bfloat16': ml_dtypes.bfloat16,
}


@pytest.fixture(scope='session')
def tokenizer_model() -> bytes:
  """A sentencepiece model of `PIECES` pieces."""
  return train_tokenizer([inspect.getsource(argparse)], PIECES)


@pytest.fixture(scope='session')
def draw_tensors() -> Callable[..., dict[str, np.ndarray]]:
  """Draws the tensors that a config.json needs, by name."""

  def draw(
    config: Mapping[str, Any], dtype: str = 'float32', seed: int = 0
  ) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    table = keys.tensors(hf_config.to_model(config, 'config.json'))
    return {
      tensor.name: (0.2 * rng.standard_normal(tensor.shape)).astype(
        DTYPES[dtype]
      )
      for tensor in table
    }

  return draw


@pytest.fixture(scope='session')
def write_hf(
  tokenizer_model: bytes, draw_tensors: Callable
) -> Callable[..., dict[str, np.ndarray]]:
  """Writes a small folder as transformers does; returns its tensors by name.

  It is a Llama of three layers in float32, in one file. `changes` are keys of
  its config.json; `tensors` are others than those drawn from `seed`.
  """

  def write(
    folder: pathlib.Path,
    dtype: str = 'float32',
    shards: int = 1,
    tensors: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    **changes: Any,
  ) -> dict[str, np.ndarray]:
    config = {**LLAMA, **changes}
    tensors = dict(tensors or draw_tensors(config, dtype, seed))
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'tokenizer.model').write_bytes(tokenizer_model)
    metadata = {'format': 'pt'}
    if shards == 1:
      save_file(tensors, folder / 'model.safetensors', metadata)
      return tensors
    files = {}
    for shard in range(shards):
      file = f'model-{shard + 1:05}-of-{shards:05}.safetensors'
      part = {name: tensors[name] for name in list(tensors)[shard::shards]}
      save_file(part, folder / file, metadata)
      files |= dict.fromkeys(part, file)
    index = {'metadata': {'total_size': 0}, 'weight_map': files}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return tensors

  return write


@pytest.fixture(scope='session')
def write_run(tokenizer_model: bytes) -> Callable[..., dict[str, np.ndarray]]:
  """Writes a checkpoint of random weights; returns them by path.

  `changes` are other weights, by path; None leaves one out.
  """

  def write(
    folder: pathlib.Path,
    config: Config,
    tokenizer: Mapping[str, bytes] | None = None,
    **changes: np.ndarray | None,
  ) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = {
      path: (0.2 * rng.standard_normal(shape) + ('norm' in path)).astype(
        DTYPES[config.model.param_dtype]
      )
      for path, shape in keys.weight_shapes(config.model).items()
    } | changes
    write_checkpoint(
      folder,
      {
        path: StreamedArray(
          array.shape, array.dtype, lambda array=array: iter([((), array)])
        )
        for path, array in weights.items()
        if array is not None
      },
      dataclasses.asdict(config),
      tokenizer or {SENTENCEPIECE_FILE: tokenizer_model},
    )
    return weights

  return write


@pytest.fixture(scope='session')
def json_tokenizer_files() -> dict[str, bytes]:
  """The files of a byte-level tokenizer, with special tokens of its own."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=PIECES,
    special_tokens=['<|begin|>', '<|end|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator([inspect.getsource(argparse)], trainer)
  config = {'bos_token': '<|begin|>', 'eos_token': '<|end|>'}
  return {
    'tokenizer.json': backend.to_str().encode(),
    'tokenizer_config.json': json.dumps(config).encode(),
  }
