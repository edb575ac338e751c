"""From a run's sources to its tokenizer and its tokenized data sets."""

import dataclasses
import time

from absl import logging
from etils import epath

from grit_jax import processes
from grit_jax.config import Config, ConfigError
from grit_jax.data import records
from grit_jax.data.dataset import Dataset, EmptySplitError, prepare
from grit_jax.data.sources import TRAIN, Source
from grit_jax.data.tokenizer import Tokenizer, load_tokenizer
from grit_jax.data.tokenizer_training import train_tokenizer

_POLL_SECONDS = 0.5


def check_kinds(config: Config, found: list[Source]) -> None:
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
  config: Config, workdir: epath.Path, found: list[Source]
) -> Tokenizer:
  """Returns the run's own tokenizer, trained on the data at its first start.

  The first of several processes trains it; the others wait for its file.
  """
  path = workdir / 'tokenizer.model'
  while not path.exists() and not processes.is_first():
    time.sleep(_POLL_SECONDS)
  if not path.exists():
    logging.info(
      'Training a tokenizer of %d pieces.', config.data.tokenizer_pieces
    )
    fraction = config.evaluation.held_out_fraction
    texts = (
      text
      for source in found
      for number, line in source.read(TRAIN, fraction)
      for text in records.strings_of(source.parse(TRAIN, number, line))
    )
    model = train_tokenizer(texts, config.data.tokenizer_pieces)
    partial_path = workdir / 'tokenizer.model.partial'
    partial_path.write_bytes(model)
    partial_path.replace(path)
  return load_tokenizer(path)


def fit_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
  """Returns the config with the vocabulary that the tokenizer needs.

  Raises:
    ConfigError: the model's vocabulary is smaller.
  """
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


def prepare_data(
  config: Config,
  workdir: epath.Path,
  found: list[Source],
  tokenizer: Tokenizer,
  split: str,
) -> dict[str, list[Dataset]]:
  """Tokenizes the data, or opens what is tokenized; data sets by kind.

  The streams that the mode lacks are empty, as is a split that holds nothing
  out.
  """
  data, objective = config.data, config.objective
  prepared: dict[str, list[Dataset]] = {
    records.EMBEDDING: [],
    records.GENERATIVE: [],
  }
  used = {
    records.EMBEDDING: objective.has_embedding,
    records.GENERATIVE: objective.has_generative,
  }
  for source in found:
    if not used[source.kind]:
      continue
    try:
      dataset = prepare(
        source,
        split,
        tokenizer,
        data.cache_dir or workdir / 'data',
        max_query_tokens=data.max_query_tokens,
        max_passage_tokens=data.max_passage_tokens,
        max_generative_tokens=data.max_generative_tokens,
        min_negatives=data.num_passages - 1,
        held_out_fraction=config.evaluation.held_out_fraction,
      )
    except EmptySplitError as error:
      if split == TRAIN:
        raise
      logging.warning('Not in the evaluation: %s', error)
      continue
    if split == TRAIN:
      _report(dataset)
    prepared[source.kind].append(dataset)
  return prepared


def _report(dataset: Dataset) -> None:
  """Says what a data set holds, and what was cut or dropped of it."""
  report = dataset.report
  logging.info(
    '%s (%s): %d records, %.2f million tokens; %d texts cut by %d tokens; '
    'dropped: %s.',
    dataset.name,
    dataset.kind,
    report.records,
    report.tokens / 1e6,
    report.cut_texts,
    report.cut_tokens,
    report.dropped or 'none',
  )
