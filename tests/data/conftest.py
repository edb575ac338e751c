"""A tiny tokenizer for the tests of data code."""

import argparse
import inspect

import pytest

from grit_jax.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope='session')
def model_bytes() -> bytes:
  """A sentencepiece model of 500 pieces."""
  return train_tokenizer([inspect.getsource(argparse)], 500)


@pytest.fixture(scope='session')
def tokenizer(model_bytes: bytes) -> Tokenizer:
  """The tokenizer of that model."""
  return Tokenizer(model_bytes)
