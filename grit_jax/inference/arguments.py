"""What commands that load a model have in common: flags, and the loading."""

import argparse
from typing import Any

from grit_jax import cli
from grit_jax.checkpoint import absolute
from grit_jax.config import MeshConfig
from grit_jax.errors import ConfigError
from grit_jax.inference.gritlm import GritLM
from grit_jax.initial import InitialModel
from grit_jax.models.quantization import KINDS


def parse_mesh(text: str) -> MeshConfig:
  """Returns the mesh that a text such as `fsdp=2,tensor=4` is."""
  sizes = {}
  for part in text.split(','):
    name, _, size = part.strip().partition('=')
    try:
      sizes[name] = int(size)
    except ValueError as error:
      raise argparse.ArgumentTypeError(
        f'{part!r} is not an axis and a number, such as tensor=4'
      ) from error
  try:
    # Without `fsdp`, the axis that takes what is left, it is not split.
    mesh = MeshConfig(**{'fsdp': 1, **sizes})
    mesh.validate()
  except (ConfigError, TypeError) as error:
    raise argparse.ArgumentTypeError(str(error)) from error
  return mesh


def add_model(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `load`."""
  parser.add_argument(
    '--model',
    type=cli.parse_given,
    required=True,
    help='a workdir, checkpoint or HF folder',
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    default='',
    help="of weights and activations (default: the model's)",
  )
  parser.add_argument(
    '--quantization', choices=KINDS, default='', help='of the layers'
  )
  add_mesh(parser)


def add_mesh(parser: argparse.ArgumentParser) -> None:
  """Adds the flag `--mesh`."""
  parser.add_argument(
    '--mesh',
    type=parse_mesh,
    help='over all devices, such as tensor=4 (default: the first device)',
  )


def describe(
  flags: argparse.Namespace, initial: InitialModel
) -> dict[str, Any]:
  """Returns what an index says of the model that the flags name.

  Args:
    flags: Those of `add_model`.
    initial: The model.
  """
  return {
    'model': str(absolute(flags.model)),
    'model_sha256': initial.fingerprint(),
    'model_files': initial.checksums(),
    'model_dtype': flags.dtype,
    'model_quantization': flags.quantization,
  }


def load(flags: argparse.Namespace) -> GritLM:
  """Loads the model that the flags of `add_model` name.

  Raises:
    UserError: As `GritLM.load`.
  """
  return GritLM.load(
    flags.model,
    mesh=flags.mesh,
    dtype=flags.dtype,
    quantization=flags.quantization,
  )
