"""A small model in a folder that PyTorch loads too."""

import dataclasses
import pathlib
from collections.abc import Callable

import pytest
from model_folders import PIECES

from grit_jax.config import Config
from grit_jax.convert.to_hf import to_hf
from grit_jax.inference.gritlm import GritLM
from grit_jax.models.presets import tiny

MODEL = dataclasses.replace(
  tiny(), vocab_size=PIECES, rope_theta=500.0, max_positions=1024
)


@pytest.fixture(scope='session')
def folder(tmp_path_factory, write_run: Callable) -> pathlib.Path:
  """A Hugging Face folder with random weights."""
  place = tmp_path_factory.mktemp('model')
  write_run(place / 'run', Config(model=MODEL))
  to_hf(place / 'run', place / 'model')
  return place / 'model'


@pytest.fixture(scope='session')
def model(folder: pathlib.Path) -> GritLM:
  """The model of the folder, as GRIT trains it: bbcc."""
  return GritLM.load(folder, dtype='float32')


@pytest.fixture(scope='session')
def causal_model(folder: pathlib.Path) -> GritLM:
  """The model of the folder, causal throughout."""
  return GritLM.load(folder, dtype='float32', attention='cccc')
