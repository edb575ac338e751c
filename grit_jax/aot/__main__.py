"""The command; see the package."""

import argparse
import dataclasses
import math
import sys

from grit_jax import cli
from grit_jax import config as configuration
from grit_jax.aot import report
from grit_jax.aot.compiler import Request, compile_step
from grit_jax.aot.program import Sizes
from grit_jax.aot.sweep import sweep
from grit_jax.aot.topologies import count_devices, find_chip
from grit_jax.config import Config
from grit_jax.errors import ConfigError
from grit_jax.files import check_writable, write_json


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the flags besides `--config`."""
  parser = cli.Parser(
    prog='python -m grit_jax.aot',
    description="Compiles a --config's step for TPUs that are not there.",
  )
  parser.add_argument(
    '--topology', type=cli.parse_given, required=True, help='such as v5e:8x8'
  )
  parser.add_argument(
    '--slices',
    type=cli.parse_positive,
    default=1,
    help='how many of it (default: %(default)s)',
  )
  parser.add_argument(
    '--embedding_rows',
    type=cli.parse_positive,
    help='packed rows of embedding texts a step (default: a row for four '
    'pairs, which is about what the data of the paper take, rounded up to '
    'divide)',
  )
  parser.add_argument(
    '--generative_rows',
    type=cli.parse_positive,
    help='packed rows of conversations a step (default: as many as '
    'conversations of the greatest length take, rounded up to divide)',
  )
  parser.add_argument(
    '--full',
    action='store_true',
    help='generate code too: minutes, but certain that it compiles',
  )
  parser.add_argument(
    '--sweep', action='store_true', help='try other executors and meshes'
  )
  parser.add_argument(
    '--output', type=cli.parse_given, help='a JSON file for the figures'
  )
  return parser


def compile_ahead(flags: argparse.Namespace) -> None:
  """Compiles, and prints what the compiler says.

  Raises:
    UserError: a flag's value cannot be, or the step cannot be compiled.
  """
  request = make_request(flags)
  if flags.output:
    # Before minutes are spent.
    check_writable(flags.output)
  figures: dict | list
  if flags.sweep:
    figures = sweep(request, lambda line: print(line, file=sys.stderr))
    print(report.describe_sweep(figures))
  else:
    figures = compile_step(request)
    figures['estimated_seconds'] = report.estimate_seconds(figures)
    print(report.describe(figures))
  if flags.output:
    write_json(flags.output, figures)


def make_request(flags: argparse.Namespace) -> Request:
  """Reads the flags.

  Raises:
    UserError: a flag's value cannot be.
  """
  find_chip(flags.topology)
  values = flags.config
  # Neither is read: shapes alone are.
  values.data.paths = values.data.paths or 'unused'
  config = configuration.resolve(values)
  if not config.model.embed_dim:
    raise ConfigError(
      'model.embed_dim=0 takes the architecture from init_from, which is not '
      'read here: name the sizes, as configs/gritlm_7b.py does.'
    )
  if not config.model.vocab_size:
    model = dataclasses.replace(
      config.model, vocab_size=config.data.tokenizer_pieces
    )
    config = dataclasses.replace(config, model=model)
  devices = flags.slices * count_devices(flags.topology)

  def divisible(rows: float) -> int:
    return math.ceil(rows / devices) * devices

  sizes = Sizes(
    flags.embedding_rows or divisible(config.data.embedding_batch / 4),
    flags.generative_rows or divisible(_worst_generative(config)),
  )
  return Request(config, flags.topology, flags.slices, sizes, flags.full)


def _worst_generative(config: Config) -> float:
  data = config.data
  return data.generative_batch * data.max_generative_tokens / data.row_length


if __name__ == '__main__':
  cli.main(make_parser(), compile_ahead, config=True)
