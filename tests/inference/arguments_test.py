"""Tests of the flags of commands that load a model."""

import argparse

import pytest

from grit_jax.config import MeshConfig
from grit_jax.inference import arguments


def test_a_mesh_is_named_by_its_axes():
  assert arguments.parse_mesh('tensor=4') == MeshConfig(fsdp=1, tensor=4)
  mesh = arguments.parse_mesh('fsdp=-1,tensor=2')
  assert mesh == MeshConfig(fsdp=-1, tensor=2)
  for text in ('4', 'tensor', 'tensor=a', 'tensor=0', 'heads=2', ''):
    with pytest.raises(argparse.ArgumentTypeError):
      arguments.parse_mesh(text)


def test_flags_are_what_a_model_is_loaded_with():
  parser = argparse.ArgumentParser()
  arguments.add_model(parser)
  flags = parser.parse_args(['--model=m', '--mesh=tensor=2', '--dtype=float32'])
  assert (flags.model, flags.dtype, flags.quantization) == ('m', 'float32', '')
  assert flags.mesh == MeshConfig(fsdp=1, tensor=2)
  with pytest.raises(SystemExit):
    parser.parse_args(['--model=m', '--quantization=int4'])
