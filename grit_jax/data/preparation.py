"""From a run's sources to its tokenizer and its tokenized data sets."""

import dataclasses
import time
from collections.abc import Iterator
from typing import TypedDict

from absl import logging
from etils import epath

from grit_jax.config import Config
from grit_jax.convert.tokenizer_files import tokenizer_json
from grit_jax.data import records
from grit_jax.data.dataset import (
  Dataset,
  EmbeddingDataset,
  EmptySplitError,
  GenerativeDataset,
  open_dataset,
)
from grit_jax.data.parts import Settings
from grit_jax.data.prepared import PreparedSource
from grit_jax.data.records import RecordError
from grit_jax.data.reports import (
  check_skipped,
  find_too_few_negatives,
  read_content,
  read_reports,
)
from grit_jax.data.sources import TRAIN, FileSource, Source
from grit_jax.data.tokenization import is_settled, tokenize
from grit_jax.data.tokenizer import (
  SentencePieceTokenizer,
  Tokenizer,
  load_tokenizer,
)
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.errors import ConfigError
from grit_jax.files import write_file

# What `sources` finds.
Found = list[Source | PreparedSource]

_POLL_SECONDS = 0.5


class Datasets(TypedDict):
  """The data sets of a split, by kind."""

  embedding: list[EmbeddingDataset]
  generative: list[GenerativeDataset]


def check_kinds(config: Config, found: Found) -> None:
  """Checks that there is data for each stream of the mode.

  Raises:
    ConfigError: there is none.
  """
  kinds = {source.kind for source in found}
  for needed, kind in (
    (config.objective.has_embedding, records.EMBEDDING),
    (config.objective.has_generative, records.GENERATIVE),
  ):
    if needed and kind not in kinds:
      raise ConfigError(
        f'objective.mode={config.objective.mode} needs {kind} records, and '
        f'data.paths={config.data.paths!r} has none. Add some, or choose '
        'another mode.'
      )


def train_or_load_tokenizer(
  config: Config, workdir: epath.Path, found: Found
) -> Tokenizer:
  """Returns the tokenizer of prepared data, or the run's own.

  The latter is trained on the data at the run's first start, by the first of
  its processes; the others wait for its file.
  """
  raw = []
  for source in found:
    if isinstance(source, PreparedSource):
      return source.load_tokenizer()
    raw.append(source)
  # Here alone, for it imports JAX, which preparing data does without.
  from grit_jax import processes

  path = workdir / 'tokenizer.model'
  while not path.exists() and not processes.is_first():
    time.sleep(_POLL_SECONDS)
  if not path.exists():
    logging.info(
      'Training a tokenizer of %d pieces.', config.data.tokenizer_pieces
    )
    texts = (text for source in raw for text in _strings(config, source))
    model = train_tokenizer(texts, config.data.tokenizer_pieces)
    write_file(path, model)
  return load_tokenizer(path)


def _strings(config: Config, source: Source) -> Iterator[str]:
  """Iterates over the strings of a source's records for training."""
  for line in source.read(config.evaluation.held_out_fraction):
    if line.split != TRAIN:
      continue
    where = source.where(line.split, line.number)
    try:
      record = records.parse(line.json, where, source.kind)
    except RecordError:
      if config.data.on_error == 'stop':
        raise
      continue  # It is counted where the data is tokenized.
    yield from records.strings_of(record)


def check_exportable(tokenizer: Tokenizer) -> None:
  """Checks that a model can be exported with a tokenizer, before it is trained.

  Raises:
    TokenizerError: it is a sentencepiece model that `tokenizer.json` cannot
      say, such as a unigram model.
  """
  if isinstance(tokenizer, SentencePieceTokenizer):
    tokenizer_json(tokenizer)


def fit_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
  """Returns the config with the vocabulary that the tokenizer needs.

  Raises:
    ConfigError: the model's vocabulary is smaller.
    TokenizerError: an export could not have the tokenizer.
  """
  check_exportable(tokenizer)
  size = config.model.vocab_size
  if size and size < tokenizer.vocab_size:
    raise ConfigError(
      f'model.vocab_size={size}, but the tokenizer has '
      f'{tokenizer.vocab_size} pieces; 0 takes the number from it.'
    )
  model = dataclasses.replace(
    config.model, vocab_size=size or tokenizer.vocab_size
  )
  return dataclasses.replace(config, model=model)


def make_settings(config: Config) -> Settings:
  """Returns what a configuration asks of data."""
  data = config.data
  return Settings(
    max_query_tokens=data.max_query_tokens,
    max_passage_tokens=data.max_passage_tokens,
    max_generative_tokens=data.max_generative_tokens,
    min_negatives=data.num_passages - 1,
    held_out_fraction=config.evaluation.held_out_fraction,
    on_error=data.on_error,
    max_skipped_fraction=data.max_skipped_fraction,
  )


def prepare_data(
  config: Config,
  workdir: epath.Path,
  found: Found,
  tokenizer: Tokenizer,
  split: str,
) -> Datasets:
  """Tokenizes the data, or opens what is tokenized; data sets by kind.

  The streams that the mode lacks are empty, as is a split that holds nothing
  out.
  """
  used = {
    records.EMBEDDING: config.objective.has_embedding,
    records.GENERATIVE: config.objective.has_generative,
  }
  found = [source for source in found if used[source.kind]]
  raw = [source for source in found if isinstance(source, Source)]
  directory = config.data.cache_dir or workdir / 'data'
  folders = iter(tokenize(raw, tokenizer, directory, make_settings(config)))
  prepared: Datasets = {records.EMBEDDING: [], records.GENERATIVE: []}
  for source in found:
    if isinstance(source, PreparedSource):
      check_prepared(config, source, tokenizer)
      folder = source.folder
    else:
      folder = next(folders)
    try:
      dataset = open_dataset(folder, split)
    except EmptySplitError as error:
      if split == TRAIN:
        raise
      logging.warning('Not in the evaluation: %s', error)
      continue
    if split == TRAIN:
      _report(dataset)
    if isinstance(dataset, EmbeddingDataset):
      prepared[records.EMBEDDING].append(dataset)
    else:
      prepared[records.GENERATIVE].append(dataset)
  return prepared


def check_prepared(
  config: Config, source: PreparedSource, tokenizer: Tokenizer
) -> None:
  """Checks that prepared data is what a run asks for.

  Raises:
    ConfigError: A key asks for other data.
    RecordError: A record has too few negatives, or the file that the data was
      made of has changed.
  """
  place, kept = source.directory, source.settings
  if source.tokenizer != tokenizer.fingerprint:
    raise ConfigError(
      f'data.tokenizer={config.data.tokenizer!r}: {place} was prepared with '
      f'another tokenizer than that of the run, {place / "tokenizer"}. Name '
      'that one, or prepare the data again.'
    )
  asked = make_settings(config)
  keys = {f'data.max_{name}_tokens' for name in asked.limits(source.kind)}
  for key in sorted({*keys, 'evaluation.held_out_fraction'}):
    name = key.split('.')[1]
    if getattr(asked, name) != kept[name]:
      raise ConfigError(
        f'{key}={getattr(asked, name)}, but {place} was prepared with '
        f'{kept[name]}. Set it to that, or prepare the data again.'
      )
  reports = read_reports(source.folder)
  skipped = sum(sum(report.skipped.values()) for report in reports)
  if skipped and asked.on_error == 'stop':
    raise ConfigError(
      f"data.on_error='stop', but {skipped} records of {source.name} were "
      f"skipped when {place} was prepared; 'skip' allows that."
    )
  check_skipped(
    reports, str(source), asked.on_error, asked.max_skipped_fraction
  )
  error = find_too_few_negatives(source.folder, asked.min_negatives)
  if error is not None:
    raise error
  _check_unchanged(source)


def _check_unchanged(source: PreparedSource) -> None:
  """Checks that the file that a data set was made of, if there, is the same."""
  path = source.folder / 'dataset.json'
  content = read_content(source.folder)
  state = content['source']['state']
  if 'path' not in state or not epath.Path(state['path']).exists():
    return
  file = FileSource(state['path'])
  if is_settled(state, file.state(), path):
    return
  if file.fingerprint() != content['identity']['source']:
    raise RecordError(
      f'{file}: changed since {source.directory} was prepared from it; prepare '
      'it again, or move the file away to train on what was prepared'
    )


def _report(dataset: Dataset) -> None:
  """Says what a data set holds, and what was cut or dropped of it."""
  report = dataset.report
  logging.info(
    '%s (%s): %d records, %.2f million tokens; %d texts cut by %d tokens; '
    'dropped: %s; skipped: %s.',
    dataset.name,
    dataset.kind,
    report.records,
    report.tokens / 1e6,
    report.cut_texts,
    report.cut_tokens,
    report.dropped or 'none',
    report.skipped or 'none',
  )
  for messages in report.faults.values():
    for message in messages:
      logging.warning('Skipped: %s', message)
