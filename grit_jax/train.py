"""Trains a GRIT model: `python -m grit_jax.train --config=... --workdir=...`.

Read it top to bottom: the order of the file is the order of a run. Started
again with the same command, a run goes on where it stopped.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from grit_jax import config as configuration
from grit_jax import optimizer as optimizers
from grit_jax import sharding
from grit_jax.checkpoint import CheckpointError, Checkpoints
from grit_jax.config import Config, ConfigError
from grit_jax.data import records
from grit_jax.data.dataset import Dataset, EmptySplitError, prepare
from grit_jax.data.formats import FormatError
from grit_jax.data.pipeline import HostBatch, Pipeline, place_batch
from grit_jax.data.records import RecordError
from grit_jax.data.sources import HELD_OUT, TRAIN, Source, sources
from grit_jax.data.tokenizer import Tokenizer, TokenizerError, train_tokenizer
from grit_jax.evaluate.held_out import HeldOutEvaluation
from grit_jax.metrics import MetricsError, MetricsWriter, plot_losses
from grit_jax.models.decoder import count_parameters
from grit_jax.objective import TrainState, create_state, make_train_step
from grit_jax.sharding import MeshError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The configuration.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is kept.')

# Keys that may change between the starts of one run: they leave its batches,
# its weights and its schedule what they were.
_CHANGEABLE = ('mesh', 'memory', 'checkpoint', 'evaluation', 'log_every')
# But for this one, which decides what is trained on.
_FIXED = 'evaluation.held_out_fraction'


class NonFiniteLossError(RuntimeError):
  """The loss or the gradient is not a number any more."""


# What ends in one message instead of a traceback: the user can mend these.
USER_ERRORS = (
  CheckpointError,
  ConfigError,
  FileNotFoundError,
  FormatError,
  MeshError,
  MetricsError,
  NonFiniteLossError,
  RecordError,
  TokenizerError,
)


def main(argv: Sequence[str]) -> None:
  """Trains as the flags say; a mistake of the user's ends in one message."""
  # Of the libraries underneath, only what may need the user's attention.
  package = os.path.dirname(__file__)
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= logging.converter.STANDARD_WARNING
      or record.pathname.startswith(package)
    )
  )
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  try:
    train(configuration.resolve(_CONFIG.value), epath.Path(_WORKDIR.value))
  except USER_ERRORS as error:
    sys.exit(f'grit_jax: error: {error}')


def train(config: Config, workdir: epath.Path) -> dict[str, Any]:
  """Runs or resumes a training run.

  Args:
    config: resolved and validated.
    workdir: created if need be; holds all that the run leaves.

  Returns:
    What `evaluation.json` holds; empty without an evaluation.

  Raises:
    One of `USER_ERRORS`, before any work is lost.
  """
  stop = _StopOnSignal()
  mesh = sharding.make_mesh(config.mesh)
  sharding.validate(config, mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  found = sources(config.data.paths, workdir / 'tfds')
  _check_kinds(config, found)

  tokenizer = load_tokenizer(config, workdir, found)
  config = fit_vocabulary(config, tokenizer)
  train_sets = prepare_data(config, workdir, found, tokenizer, TRAIN)
  pipeline = Pipeline(
    config,
    train_sets[records.EMBEDDING],
    train_sets[records.GENERATIVE],
    sharding.row_shards(mesh),
  )
  batches = pipeline.iterate()
  _report_data(config, pipeline, train_sets)

  optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
  schedule = optimizers.make_schedule(config.optimizer, config.steps)
  train_step = make_train_step(config, optimizer, schedule)
  with (
    jax.set_mesh(mesh),
    Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
  ):
    latest = checkpoints.latest()
    _check_same_run(config, checkpoints, latest)
    _write_json(workdir / 'config.json', dataclasses.asdict(config))
    initialise = jax.jit(partial(create_state, config, optimizer))
    if latest is None:
      state = initialise(jax.random.key(config.seed))
      start = 0
    else:
      abstract = jax.eval_shape(initialise, jax.random.key(config.seed))
      state = checkpoints.restore(latest, abstract, batches)
      start = latest
      logging.info('Going on from %s.', checkpoints.path(latest))
    logging.info(
      '%.1f million weights on a mesh of %s.',
      count_parameters(config.model) / 1e6,
      dict(mesh.shape),
    )

    evaluation, held_out = None, {}
    if config.evaluation.enabled:
      held_out = prepare_data(config, workdir, found, tokenizer, HELD_OUT)
    if any(held_out.values()):
      evaluation = HeldOutEvaluation(
        config,
        mesh,
        tokenizer,
        held_out[records.EMBEDDING],
        held_out[records.GENERATIVE],
      )
      _evaluate_before(workdir, evaluation, state, start)

    save = partial(
      checkpoints.save,
      data_iterator=batches,
      config=dataclasses.asdict(config),
      tokenizer=tokenizer.model_bytes,
    )
    with MetricsWriter(workdir, start, config.steps) as writer:
      loop = _Loop(config, pipeline, checkpoints, writer)
      state, step = loop.run(train_step, state, batches, mesh, save, stop)
    if stop.requested:
      logging.info(
        'Stopped by a signal after step %d, which is saved; the same command '
        'goes on.',
        step,
      )
      return {}
    plot_losses(workdir)
    if evaluation is None:
      return {}
    return _evaluate_after(workdir, evaluation, state)


class _StopOnSignal:
  """Remembers a SIGTERM (or Ctrl-C), so that the loop can save and end."""

  def __init__(self):
    self.requested = False
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._request)

  def _request(self, number: int, frame: Any) -> None:
    del frame
    self.requested = True
    # A second one ends the process at once.
    signal.signal(number, signal.SIG_DFL)


def _check_kinds(config: Config, found: list[Source]) -> None:
  """Checks that there is data for each stream of the mode."""
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


def load_tokenizer(
  config: Config, workdir: epath.Path, found: list[Source]
) -> Tokenizer:
  """Returns the tokenizer that is given, or one trained on the data."""
  if config.data.tokenizer:
    return Tokenizer.load(config.data.tokenizer)
  path = workdir / 'tokenizer.model'
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
  return Tokenizer.load(path)


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
  fraction = config.evaluation.held_out_fraction
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
        held_out_fraction=fraction,
      )
    except EmptySplitError as error:
      if split == TRAIN:
        raise
      logging.warning('Not in the evaluation: %s', error)
      continue
    prepared[source.kind].append(dataset)
  return prepared


def _report_data(
  config: Config, pipeline: Pipeline, sets: dict[str, list[Dataset]]
) -> None:
  """Says what the run trains on, and what was cut or dropped of it."""
  for kind, datasets in sets.items():
    for dataset in datasets:
      report = dataset.report
      logging.info(
        '%s (%s): %d records, %.2f million tokens; %d texts cut by %d tokens; '
        'dropped: %s.',
        dataset.name,
        kind,
        report.records,
        report.tokens / 1e6,
        report.cut_texts,
        report.cut_tokens,
        report.dropped or 'none',
      )
  for name, needed in (
    ('embedding', config.objective.has_embedding),
    ('generative', config.objective.has_generative),
  ):
    if needed:
      order = getattr(pipeline.plan, f'{name}_order')
      logging.info(
        '%s: %.2f epochs of %d batches; %d records sit each epoch out.',
        name,
        config.steps / order.batches_per_epoch,
        order.batches_per_epoch,
        order.left_out_per_epoch,
      )
  logging.info(
    'Rows of %d tokens a step (embedding, generative): %s.',
    config.data.row_length,
    pipeline.buckets,
  )


def _check_same_run(
  config: Config, checkpoints: Checkpoints, latest: int | None
) -> None:
  """Checks that the workdir's run has this configuration."""
  if latest is None:
    return
  kept = checkpoints.read_config(latest)
  now = json.loads(json.dumps(dataclasses.asdict(config)))
  changed = [
    f'{key}: {before!r}, now {after!r}'
    for key, before, after in _differences(kept, now)
    if key.split('.')[0] not in _CHANGEABLE or key == _FIXED
  ]
  if changed:
    raise ConfigError(
      f'{checkpoints.path(latest)} is of a run with another configuration ('
      + '; '.join(changed)
      + '). Take another workdir.'
    )


def _differences(
  before: dict[str, Any], after: dict[str, Any], prefix: str = ''
) -> list[tuple[str, Any, Any]]:
  found = []
  for name in sorted({*before, *after}):
    old, new = before.get(name), after.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      found += _differences(old, new, f'{prefix}{name}.')
    elif old != new:
      found.append((prefix + name, old, new))
  return found


class _Loop:
  """The training loop, which never waits for the step just dispatched."""

  def __init__(
    self,
    config: Config,
    pipeline: Pipeline,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
  ):
    self.config, self.pipeline = config, pipeline
    self.checkpoints, self.writer = checkpoints, writer
    self.logged_at = time.perf_counter()
    self.useful_tokens = 0

  def run(
    self,
    train_step: Any,
    state: TrainState,
    batches: Any,
    mesh: jax.sharding.Mesh,
    save: Any,
    stop: _StopOnSignal,
  ) -> tuple[TrainState, int]:
    """Trains until the last step or a signal; returns the steps done."""
    step = int(state.step)
    pending = None
    while step < self.config.steps and not stop.requested:
      host = next(batches)
      state, metrics = train_step(state, place_batch(mesh, host.batch))
      step += 1
      if pending is not None:
        self._report(*pending)
      pending = (step, metrics, host)
      if step % self.config.checkpoint.every_steps == 0:
        self._report(*pending)
        pending = None
        save(step, state)
    if pending is not None:
      self._report(*pending)
    if step and step != self.checkpoints.latest():
      save(step, state)
    self.checkpoints.wait()
    return state, step

  def _report(self, step: int, metrics: Any, host: HostBatch) -> None:
    """Checks and, every `log_every` steps, writes a step's metrics."""
    metrics = {name: float(value) for name, value in metrics.items()}
    self._check_finite(step, metrics)
    self.useful_tokens += host.useful_tokens
    last = step == self.config.steps
    if step % self.config.log_every and step != 1 and not last:
      self.writer.advance(step)
      return
    now = time.perf_counter()
    self.writer.write(
      step,
      {
        **metrics,
        'tokens_per_second': self.useful_tokens / (now - self.logged_at),
        # Of this step alone, so that a resumed run's lines are the same.
        'padding_fraction': 1 - host.useful_tokens / host.computed_tokens,
      },
    )
    self.logged_at = now
    self.useful_tokens = 0

  def _check_finite(self, step: int, metrics: dict[str, float]) -> None:
    """Stops a run whose loss or gradient is not finite any more."""
    if np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm']):
      return
    self.checkpoints.wait()
    latest = self.checkpoints.latest()
    good = 'none' if latest is None else self.checkpoints.path(latest)
    names = self.pipeline.plan.describe_records(step - 1)
    raise NonFiniteLossError(
      f'step {step}: loss={metrics["loss"]}, '
      f'grad_norm={metrics["grad_norm"]}. Last good checkpoint: {good}. '
      f'Records of the batch: {", ".join(names)}'
    )


def _evaluate_before(
  workdir: epath.Path,
  evaluation: HeldOutEvaluation,
  state: TrainState,
  start: int,
) -> None:
  """Evaluates the untrained model and the baselines, once a run."""
  path = workdir / 'evaluation.json'
  if start and path.exists():
    return
  logging.info('Evaluating before training.')
  before = evaluation.evaluate(state.model) if not start else None
  _write_json(path, {'before': before, **evaluation.baselines()})


def _evaluate_after(
  workdir: epath.Path, evaluation: HeldOutEvaluation, state: TrainState
) -> dict[str, Any]:
  """Evaluates the trained model, and prints the whole evaluation."""
  path = workdir / 'evaluation.json'
  results = json.loads(path.read_text())
  after = evaluation.evaluate(state.model)
  results = {'before': results.pop('before'), 'after': after, **results}
  _write_json(path, results)
  print(_table(results))
  print(evaluation.show_examples(state.model))
  return results


def _table(results: dict[str, Any]) -> str:
  """Returns the evaluation as a table to be read."""
  names = [
    'recall_at_1',
    'recall_at_10',
    'ndcg_at_10',
    'candidates',
    'generative_loss',
  ]
  names = [name for name in names if name in results['after']]
  lines = [''.join([f'{"":8}', *(f'{name:>17}' for name in names)])]
  for row, values in results.items():
    cells = [
      f'{values[name]:17.3f}'
      if isinstance(values.get(name), float)
      else f'{values.get(name, ""):>17}'
      for name in names
    ]
    lines.append(''.join([f'{row:8}', *cells]))
  return '\n'.join(lines)


def _write_json(path: epath.Path, value: Any) -> None:
  """Writes a file whole or not at all."""
  partial_path = path.with_name(path.name + '.partial')
  partial_path.write_text(json.dumps(value, indent=2) + '\n')
  partial_path.replace(path)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
