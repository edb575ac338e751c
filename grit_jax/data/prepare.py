"""Prepares data: `python -m grit_jax.data.prepare --source=... --target=...`.

It validates and tokenizes everything, in parallel, and leaves a folder that
`data.paths` takes. `grit_jax.train` does the same by itself for data that is
not prepared; to prepare it apart saves the time on the machines that train.
Started again with the same command, it goes on where it stopped.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags
from etils import epath

from grit_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  EvaluationConfig,
)
from grit_jax.data import summary
from grit_jax.data.folders import PreparationError
from grit_jax.data.preparation import make_settings
from grit_jax.data.prepared import PreparedSource, write_prepared
from grit_jax.data.records import RecordError
from grit_jax.data.sources import Source, sources
from grit_jax.data.tokenization import tokenize
from grit_jax.data.tokenizer import TokenizerError, load_tokenizer
from grit_jax.logs import quiet_libraries

_SOURCE = flags.DEFINE_string(
  'source', None, 'Files, folders and tfds:NAME, separated by commas.'
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'A sentencepiece model, a tokenizer.json, or a folder.'
)
_TARGET = flags.DEFINE_string('target', None, 'The folder to write.')

# The defaults are those of the configuration.
_DATA = [
  flags.DEFINE_integer(name, getattr(DataConfig, name), help_text)
  for name, help_text in (
    ('max_query_tokens', 'Tokens of a query; more are cut.'),
    ('max_passage_tokens', 'Tokens of a passage; more are cut.'),
    ('max_generative_tokens', 'Tokens of a conversation; more are cut.'),
    ('num_passages', 'A query: one positive, the others its negatives.'),
  )
] + [
  flags.DEFINE_enum(
    'on_error', DataConfig.on_error, ['stop', 'skip'], 'For faulty records.'
  ),
  flags.DEFINE_float(
    'max_skipped_fraction',
    DataConfig.max_skipped_fraction,
    'The share of records of a data set that may be skipped.',
  ),
]
_HELD_OUT_FRACTION = flags.DEFINE_float(
  'held_out_fraction',
  EvaluationConfig.held_out_fraction,
  "The share of a file's records that is held out.",
)

# What ends in one message instead of a traceback: the user can mend these.
_USER_ERRORS = (
  ConfigError,
  FileNotFoundError,
  PreparationError,
  RecordError,
  TokenizerError,
)


def main(argv: Sequence[str]) -> None:
  """Prepares as the flags say; a mistake of the user's ends in one message."""
  quiet_libraries()
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  values = {flag.name: flag.value for flag in _DATA}
  longest = max(n for name, n in values.items() if name.endswith('_tokens'))
  config = Config(
    data=DataConfig(
      paths=_SOURCE.value,
      tokenizer=_TOKENIZER.value,
      row_length=max(longest, 1),
      **values,
    ),
    evaluation=EvaluationConfig(held_out_fraction=_HELD_OUT_FRACTION.value),
  )
  try:
    config.data.validate()
    config.evaluation.validate()
    prepare(config, _TARGET.value)
  except _USER_ERRORS as error:
    sys.exit(f'grit_jax: error: {error}')
  except KeyboardInterrupt:
    sys.exit('grit_jax: stopped; the same command goes on from what is whole')


def prepare(config: Config, target: str) -> None:
  """Prepares the data of a configuration.

  Args:
    config: `data`, with a tokenizer, and `evaluation.held_out_fraction`.
    target: the folder to write, on a local or mounted disk.

  Raises:
    One of the errors that the command turns into a message.
  """
  directory = pathlib.Path(target)
  for entry in config.data.paths.split(','):
    if os.path.realpath(entry.strip()) == os.path.realpath(target):
      raise ConfigError(
        f'{target} is both source and target; choose another folder to write.'
      )
  tokenizer = load_tokenizer(config.data.tokenizer)
  found = sources(config.data.paths, epath.Path(target) / 'tfds')
  for source in found:
    if isinstance(source, PreparedSource):
      raise ConfigError(f'{source.directory} is already prepared.')
  settings = make_settings(config)
  raw = [source for source in found if isinstance(source, Source)]
  folders = tokenize(raw, tokenizer, target, settings)
  summaries = [summary.summarize(folder) for folder in folders]
  summary.write(summaries, directory)
  write_prepared(directory, folders, tokenizer, dataclasses.asdict(settings))
  print(summary.tabulate(summaries))
  print(f'Train on it with --config.data.paths={target}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['source', 'tokenizer', 'target'])
  app.run(main)
