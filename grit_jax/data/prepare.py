"""Prepares data: `python -m grit_jax.data.prepare --source=... --target=...`.

It validates and tokenizes everything, in parallel, and leaves a folder that
`data.paths` takes. `grit_jax.train` does the same by itself for data that is
not prepared; to prepare it apart saves the time on the machines that train.
Started again with the same command, it goes on where it stopped.
"""

import argparse
import dataclasses
import os
import pathlib

from etils import epath

from grit_jax import cli
from grit_jax.config import (
  Config,
  Count,
  DataConfig,
  EvaluationConfig,
  Share,
  ShareBelowOne,
)
from grit_jax.data import summary
from grit_jax.data.preparation import check_exportable, make_settings
from grit_jax.data.prepared import PreparedSource, write_prepared
from grit_jax.data.sources import Source, sources
from grit_jax.data.tokenization import tokenize
from grit_jax.data.tokenizer import Tokenizer, load_tokenizer
from grit_jax.errors import ConfigError, UserError
from grit_jax.files import check_place, is_local, lock, writing


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the flags; the defaults are the configuration's."""
  parser = cli.Parser(
    prog='python -m grit_jax.data.prepare',
    description='Validates and tokenizes data for training.',
  )
  for name, help_text in (
    ('source', 'files, folders and tfds:NAME, separated by commas'),
    ('tokenizer', 'a sentencepiece model, a tokenizer.json, or a folder'),
    ('target', 'the folder to write'),
  ):
    parser.add_argument(
      f'--{name}', type=cli.parse_given, required=True, help=help_text
    )
  for name, help_text in (
    ('max_query_tokens', 'tokens of a query; more are cut'),
    ('max_passage_tokens', 'tokens of a passage; more are cut'),
    ('max_generative_tokens', 'tokens of a conversation; more are cut'),
    ('num_passages', 'a query: one positive, the others its negatives'),
  ):
    parser.add_argument(
      f'--{name}',
      type=cli.number(Count),
      default=getattr(DataConfig, name),
      help=f'{help_text} (default: %(default)s)',
    )
  parser.add_argument(
    '--on_error',
    choices=('stop', 'skip'),
    default=DataConfig.on_error,
    help='for faulty records (default: %(default)s)',
  )
  parser.add_argument(
    '--max_skipped_fraction',
    type=cli.number(Share),
    default=DataConfig.max_skipped_fraction,
    help='the share of records of a data set that may be skipped '
    '(default: %(default)s)',
  )
  parser.add_argument(
    '--held_out_fraction',
    type=cli.number(ShareBelowOne),
    default=EvaluationConfig.held_out_fraction,
    help="the share of a file's records that is held out "
    '(default: %(default)s)',
  )
  return parser


def make_config(flags: argparse.Namespace) -> Config:
  """Returns the configuration that the flags are part of.

  Raises:
    ConfigError: a value cannot be.
  """
  longest = max(
    flags.max_query_tokens,
    flags.max_passage_tokens,
    flags.max_generative_tokens,
  )
  config = Config(
    data=DataConfig(
      paths=flags.source,
      tokenizer=flags.tokenizer,
      row_length=max(longest, 1),
      max_query_tokens=flags.max_query_tokens,
      max_passage_tokens=flags.max_passage_tokens,
      max_generative_tokens=flags.max_generative_tokens,
      num_passages=flags.num_passages,
      on_error=flags.on_error,
      max_skipped_fraction=flags.max_skipped_fraction,
    ),
    evaluation=EvaluationConfig(held_out_fraction=flags.held_out_fraction),
  )
  config.data.validate()
  config.evaluation.validate()
  return config


def prepare(config: Config, target: str) -> None:
  """Prepares the data of a configuration.

  Args:
    config: `data`, with a tokenizer, and `evaluation.held_out_fraction`.
    target: the folder to write, on a local or mounted disk.

  Raises:
    UserError: the data, the tokenizer or the target cannot be used.
  """
  check_place(target)
  if not is_local(target):
    raise UserError(f'{target}: not a folder of a local or mounted disk')
  directory = pathlib.Path(target)
  for entry in config.data.paths.split(','):
    if os.path.realpath(entry.strip()) == os.path.realpath(target):
      raise ConfigError(
        f'{target} is both source and target; choose another folder to write.'
      )
  tokenizer = load_tokenizer(config.data.tokenizer)
  check_exportable(tokenizer)
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  with lock(directory / '.lock'):
    _prepare(config, directory, tokenizer)
  print(f'Train on it with --config.data.paths={target}')


def _prepare(
  config: Config, directory: pathlib.Path, tokenizer: Tokenizer
) -> None:
  found = sources(config.data.paths, epath.Path(directory) / 'tfds')
  for source in found:
    if isinstance(source, PreparedSource):
      raise ConfigError(f'{source.directory} is already prepared.')
  settings = make_settings(config)
  raw = [source for source in found if isinstance(source, Source)]
  folders = tokenize(raw, tokenizer, directory, settings)
  summaries = [summary.summarize(folder) for folder in folders]
  summary.write(summaries, directory)
  write_prepared(directory, folders, tokenizer, dataclasses.asdict(settings))
  print(summary.tabulate(summaries))


if __name__ == '__main__':
  cli.main(
    make_parser(),
    lambda flags: prepare(make_config(flags), flags.target),
    stopped='stopped; the same command resumes after what is whole',
  )
