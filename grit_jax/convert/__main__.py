"""Converts models: `python -m grit_jax.convert COMMAND --help`."""

import argparse
import re

import jax

from grit_jax import cli
from grit_jax.convert.from_hf import from_hf
from grit_jax.convert.to_hf import DTYPES, MAX_SHARD_BYTES, to_hf
from grit_jax.convert.to_peft import to_peft

_UNITS = {'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def parse_size(text: str) -> int:
  """Returns the bytes that a size such as `5GB` is."""
  match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)', text.upper())
  size = float(match[1]) * _UNITS[match[2]] if match else 0
  if not 1 <= size < 2**63:
    raise argparse.ArgumentTypeError(f'{text!r} is not a size such as 5GB')
  return int(size)


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command and its flags."""
  parser = cli.Parser(
    prog='python -m grit_jax.convert',
    description='Converts models.',
  )
  commands = parser.add_subparsers(dest='command', required=True)
  command = commands.add_parser(
    'from_hf',
    help='a Hugging Face folder into a checkpoint',
  )
  command.add_argument(
    '--source', type=cli.parse_given, required=True, help='the folder; local'
  )
  command.add_argument(
    '--target',
    type=cli.parse_given,
    required=True,
    help='the checkpoint; it must not exist',
  )
  command = commands.add_parser(
    'to_hf',
    help="a run's model into a folder that other tools load",
  )
  command.add_argument(
    '--source',
    type=cli.parse_given,
    required=True,
    help="a run's workdir, for its newest checkpoint, or a checkpoint",
  )
  command.add_argument(
    '--target',
    type=cli.parse_given,
    required=True,
    help='the folder; local, it must not exist',
  )
  command.add_argument(
    '--dtype', choices=DTYPES, help='of the weights (default: as stored)'
  )
  command.add_argument(
    '--max_shard_size',
    type=parse_size,
    default=MAX_SHARD_BYTES,
    help='of a file of weights, at most (default: 5GB)',
  )
  command = commands.add_parser(
    'to_peft',
    help="a run's adapters into a folder that PEFT loads",
  )
  command.add_argument(
    '--source',
    type=cli.parse_given,
    required=True,
    help='the workdir of a run with lora.rank, or a checkpoint of one',
  )
  command.add_argument(
    '--target',
    type=cli.parse_given,
    required=True,
    help='the folder; local, it must not exist',
  )
  command.add_argument(
    '--base',
    default='',
    help="the folder or name of their base (default: the run's init_from)",
  )
  return parser


def convert(flags: argparse.Namespace) -> None:
  """Converts as the flags say."""
  # All is the host's work: an accelerator may be busy, or somebody else's.
  jax.config.update('jax_platforms', 'cpu')
  if flags.command == 'from_hf':
    from_hf(flags.source, flags.target)
  elif flags.command == 'to_peft':
    to_peft(flags.source, flags.target, flags.base)
  else:
    to_hf(flags.source, flags.target, flags.dtype, flags.max_shard_size)


if __name__ == '__main__':
  cli.main(make_parser(), convert, stopped='stopped; {target} is not written.')
