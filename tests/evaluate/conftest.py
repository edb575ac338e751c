"""A small model with random weights, as a checkpoint and exported."""

import argparse
import dataclasses
import inspect
import pathlib

import numpy as np
import pytest

from grit_jax.config import Config, DataConfig
from grit_jax.convert import keys
from grit_jax.convert.streamed import StreamedArray, write_checkpoint
from grit_jax.convert.to_hf import MAX_SHARD_BYTES, to_hf
from grit_jax.data.tokenizer import SENTENCEPIECE_FILE
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.models.presets import tiny

PIECES = 400
# The pieces of single bytes in its vocabulary.
BYTES = slice(3, 259)


@pytest.fixture(scope='session')
def random_run(tmp_path_factory) -> pathlib.Path:
  """The folder of a checkpoint."""
  folder = tmp_path_factory.mktemp('random') / 'run'
  config = Config(
    model=dataclasses.replace(
      tiny(), vocab_size=PIECES, num_layers=1, max_positions=128
    ),
    data=DataConfig(paths='pairs.jsonl'),
  )
  rng = np.random.default_rng(0)
  arrays = {}
  for path, shape in keys.weight_shapes(config.model).items():
    array = 0.2 * rng.standard_normal(shape) + ('norm' in path)
    if path == 'head':
      # Generates no pieces of single bytes: tools differ in how they show bytes
      # that are no characters.
      array[:, BYTES] = 0
    array = array.astype(config.model.param_dtype)
    arrays[path] = StreamedArray(
      array.shape, array.dtype, lambda array=array: iter([((), array)])
    )
  model = train_tokenizer([inspect.getsource(argparse)], PIECES)
  write_checkpoint(
    folder, arrays, dataclasses.asdict(config), {SENTENCEPIECE_FILE: model}
  )
  return folder


@pytest.fixture(scope='session')
def exported(random_run: pathlib.Path) -> pathlib.Path:
  """The same model in a Hugging Face folder."""
  folder = random_run.parent / 'hf'
  to_hf(random_run, folder, 'float32', MAX_SHARD_BYTES)
  return folder
