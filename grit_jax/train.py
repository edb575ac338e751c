"""Trains a GRIT model: `python -m grit_jax.train --config=... --workdir=...`.

Read it top to bottom: the order of the file is the order of a run. Started
again with the same command, a run goes on where it stopped.
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import grain
import jax
import optax
from absl import logging
from etils import epath

from grit_jax import cli, lease, processes, resume, sharding
from grit_jax import config as configuration
from grit_jax import optimizer as optimizers
from grit_jax.checkpoint import (
  Checkpoint,
  Checkpoints,
  find_checkpoint,
  has_checkpoint,
)
from grit_jax.config import Config
from grit_jax.data import records
from grit_jax.data.filling import RowShards
from grit_jax.data.pipeline import Pipeline
from grit_jax.data.preparation import (
  Datasets,
  Found,
  check_kinds,
  fit_vocabulary,
  prepare_data,
  train_or_load_tokenizer,
)
from grit_jax.data.sources import HELD_OUT, TRAIN, sources
from grit_jax.data.tokenizer import Tokenizer, load_tokenizer
from grit_jax.errors import ConfigError, UserError
from grit_jax.evaluate.held_out import HeldOutEvaluation
from grit_jax.files import check_place, write_json
from grit_jax.initial import (
  InitialModel,
  check_base,
  describe_base,
  load_base,
  load_model,
  open_initial,
  take_architecture,
)
from grit_jax.loop import Loop
from grit_jax.metrics import MetricsWriter, plot_losses
from grit_jax.models.attention import choose_kernel
from grit_jax.models.decoder import Decoder, count_parameters
from grit_jax.models.lora import add_adapters, join_trained, split_trained
from grit_jax.objective import TrainState, create_state, make_train_step
from grit_jax.processes import StopOnSignal
from grit_jax.profile import Profile, check_profiler
from grit_jax.xla_options import compiler_options

# The exit status of a run that a signal has stopped: what shells and schedulers
# know SIGTERM by, so that none takes the run for finished.
STOPPED = 128 + signal.SIGTERM


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the flags besides `--config`."""
  parser = cli.Parser(
    prog='python -m grit_jax.train',
    description='Trains as --config=FILE and --config.KEY=VALUE say.',
  )
  parser.add_argument(
    '--workdir',
    type=cli.parse_given,
    required=True,
    help='where the run is kept',
  )
  parser.add_argument(
    '--coordinator_address',
    type=cli.parse_given,
    help='HOST:PORT of process 0 of several. This and the next two are found '
    'by themselves on TPU VMs, on GKE and under Slurm.',
  )
  parser.add_argument(
    '--num_processes', type=cli.parse_positive, help='processes of the run'
  )
  parser.add_argument(
    '--process_id',
    type=cli.number(configuration.Size),
    help='number of this process, from 0',
  )
  return parser


def start(flags: argparse.Namespace) -> None:
  """Trains as the flags say, with the run's other processes.

  Raises:
    UserError: as `train`; or the processes do not find each other.
  """
  config = configuration.resolve(flags.config)
  processes.start_processes(
    flags.coordinator_address, flags.num_processes, flags.process_id
  )
  if not processes.is_first():
    logging.set_verbosity(logging.WARNING)
  check_place(flags.workdir)
  train(config, epath.Path(flags.workdir))


def train(config: Config, workdir: epath.Path) -> dict[str, Any]:
  """Runs or resumes a training run.

  Args:
    config: resolved and validated.
    workdir: created if need be; holds all that the run leaves.

  Returns:
    What `evaluation.json` holds; empty without an evaluation.

  Raises:
    UserError: before any work is lost. SystemExit: with `STOPPED`, after a
      signal.
  """
  stop = StopOnSignal()
  mesh = sharding.make_mesh(config.mesh)
  check_profiler(config.profile, mesh.devices.flat[0].platform)
  workdir.mkdir(parents=True, exist_ok=True)
  with lease.hold(workdir) as check_lease:
    return _prepare(config, workdir, mesh, stop, check_lease)


def _prepare(
  config: Config,
  workdir: epath.Path,
  mesh: jax.sharding.Mesh,
  stop: StopOnSignal,
  check_lease: Callable[[], None],
) -> dict[str, Any]:
  """Finds model, tokenizer and data, checks that they fit, and runs."""
  kept = find_checkpoint(workdir) if has_checkpoint(workdir) else None
  initial = _open_initial(config, workdir, kept)
  if initial is not None:
    config = take_architecture(config, initial)
  sharding.validate(config, mesh)
  check_fits(config, mesh)
  # Before they wait for each other in the middle of something.
  processes.check_equal('the configuration', repr(config))
  platform = mesh.devices.flat[0].platform
  kernel = choose_kernel(config.attention_kernel, platform)
  logging.info(
    'Attention runs in the kernel %s on %s (attention_kernel=%s).',
    kernel,
    platform,
    config.attention_kernel,
  )
  disk = epath.Path(config.data.cache_dir or workdir)
  found = sources(config.data.paths, disk / 'tfds')
  check_kinds(config, found)

  tokenizer = _find_tokenizer(config, workdir, found, initial)
  config = fit_vocabulary(config, tokenizer)
  if kept is not None:
    resume.check_same_config(config, kept)
    resume.check_same_initial(config, kept)
    resume.check_same_tokenizer(tokenizer, kept)
  train_sets = prepare_data(config, workdir, found, tokenizer, TRAIN)
  held_out: Datasets = {records.EMBEDDING: [], records.GENERATIVE: []}
  if config.evaluation.enabled:
    held_out = prepare_data(config, workdir, found, tokenizer, HELD_OUT)
  pipeline = Pipeline(
    config,
    train_sets[records.EMBEDDING],
    train_sets[records.GENERATIVE],
    RowShards(sharding.row_shards(mesh), sharding.own_row_shards(mesh)),
  )
  base = describe_base(initial) if initial and config.lora.rank else None
  if kept is not None:
    began_with = kept.fingerprints['run']['init_from']
  elif base is not None:
    began_with = base['fingerprint']
  else:
    began_with = initial.fingerprint() if initial else ''
  run = resume.describe_run(began_with, tokenizer, train_sets)
  processes.check_equal('the prepared data', repr(run))
  processes.check_equal('the plan', repr(pipeline.buckets))
  if kept is not None:
    resume.check_same_data(config, run, kept)
  _report_plan(config, pipeline)

  with (
    jax.set_mesh(mesh),
    Checkpoints(workdir, config.checkpoint.keep, check_lease) as checkpoints,
  ):
    batches = pipeline.iterate()
    save = partial(
      checkpoints.save,
      data_iterator=batches,
      config=dataclasses.asdict(config),
      tokenizer=tokenizer.files,
      run=run,
      base=base,
    )
    return _run(
      config, workdir, tokenizer, pipeline, batches, held_out, initial,
      checkpoints, save, stop,
    )  # fmt: skip


def _run(
  config: Config,
  workdir: epath.Path,
  tokenizer: Tokenizer,
  pipeline: Pipeline,
  batches: grain.DatasetIterator,
  held_out: Datasets,
  initial: InitialModel | None,
  checkpoints: Checkpoints,
  save: Callable[..., bool],
  stop: StopOnSignal,
) -> dict[str, Any]:
  """Trains on what is prepared; evaluates before, at times, and after."""
  mesh = jax.sharding.get_mesh()
  _write_json(workdir / 'config.json', dataclasses.asdict(config))
  optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
  state, frozen = _start_state(config, optimizer, initial, checkpoints, batches)
  start = int(state.step)
  logging.info(
    '%.1f million weights, %.1f million trained, on a mesh of %s.',
    count_parameters(config.model) / 1e6,
    sum(x.size for x in jax.tree.leaves(state.model)) / 1e6,
    dict(mesh.shape),
  )

  evaluation = before = None
  if any(held_out.values()):
    evaluation = HeldOutEvaluation(
      config,
      mesh,
      tokenizer,
      held_out[records.EMBEDDING],
      held_out[records.GENERATIVE],
    )
    model = join_trained(state.model, frozen)
    before = _evaluate_before(workdir, evaluation, model, start)
    del model

  schedule = optimizers.make_schedule(config.optimizer, config.steps)
  options = compiler_options(mesh.devices.flat[0].device_kind)
  train_step = partial(
    make_train_step(config, optimizer, schedule, options), frozen=frozen
  )
  with (
    MetricsWriter(workdir, start, config.steps) as writer,
    Profile(config.profile, workdir) as profile,
  ):
    if before is not None and config.evaluation.every_steps:
      writer.write_evaluation(0, before)
    evaluate = None
    if evaluation is not None:

      def evaluate(model: Decoder) -> dict[str, float]:
        return evaluation.evaluate(join_trained(model, frozen))

    loop = Loop(config, pipeline, checkpoints, writer, profile, evaluate)
    state, step = loop.run(train_step, state, batches, mesh, save, stop)
  if step < config.steps:
    logging.info(
      'Stopped by a signal after step %d%s; the same command goes on.',
      step,
      ', which is saved' if step else '',
    )
    sys.exit(STOPPED)
  if processes.is_first():
    plot_losses(workdir)
  if evaluation is None:
    return {}
  return _evaluate_after(workdir, evaluation, join_trained(state.model, frozen))


def check_fits(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Checks that a run's state fits its devices, before anything is there.

  Activations come on top of it: what passes may still be too large.

  Raises:
    UserError: it is larger than their memory.
  """
  stored = {'float32': 4.0, 'bfloat16': 2.0, 'int8': 1.0, 'nf4': 0.5}
  if config.lora.rank:
    # The adapters and their moments are small beside what they adapt.
    weight_bytes = stored[config.lora.base]
  else:
    weight_bytes = (
      stored[config.model.param_dtype]
      + stored[config.optimizer.first_moment_dtype]
      + stored['float32']
    )
  # Each index of `data` has a copy.
  shards = mesh.size // mesh.shape['data']
  needed = count_parameters(config.model) * weight_bytes / shards
  memory = sharding.device_memory(mesh)
  if needed > memory:
    kind = mesh.local_devices[0].device_kind
    raise UserError(
      f'{count_parameters(config.model):,} weights and their optimizer state '
      f'take {needed / 2**30:,.1f} GiB a device, of {memory / 2**30:,.1f} GiB '
      f'({kind}). Take a smaller model, or more devices in mesh.fsdp, '
      'mesh.expert or mesh.tensor.'
    )


def _open_initial(
  config: Config, workdir: epath.Path, kept: Checkpoint | None
) -> InitialModel | None:
  """Opens what the weights come from; None: they are drawn at random.

  A run that has saved a checkpoint needs its `init_from` no more: the
  checkpoint has the architecture and the tokenizer too. One of adapters needs
  their base, wherever it is now.
  """
  if not config.init_from:
    if config.lora.rank:
      raise ConfigError(
        f'lora.rank={config.lora.rank}: adapters need a base. Name it by '
        'init_from.'
      )
    return None
  if kept is None:
    return open_initial(config.init_from)
  if not config.lora.rank:
    return open_initial(workdir)
  base = open_initial(config.init_from)
  check_base(kept, base)
  return base


def _find_tokenizer(
  config: Config,
  workdir: epath.Path,
  found: Found,
  initial: InitialModel | None,
) -> Tokenizer:
  """Returns the tokenizer that is given, the model's, or a trained one."""
  if config.data.tokenizer:
    return load_tokenizer(config.data.tokenizer)
  if initial is not None:
    return initial.tokenizer
  return train_or_load_tokenizer(config, workdir, found)


def _start_state(
  config: Config,
  optimizer: optax.GradientTransformation,
  initial: InitialModel | None,
  checkpoints: Checkpoints,
  batches: grain.DatasetIterator,
) -> tuple[TrainState, Decoder | None]:
  """Returns the newest checkpoint's state, or the one that a run begins with.

  And what is frozen beside it, of a run that trains adapters. The state of a
  checkpoint's data goes into `batches`.
  """
  key = jax.random.key(config.seed)
  if initial is not None and config.lora.rank:
    return _start_adapters(config, optimizer, initial, checkpoints, batches)
  draw = jax.jit(partial(Decoder, config.model))
  latest = checkpoints.latest()
  if latest is not None:
    abstract = jax.eval_shape(
      lambda key: create_state(optimizer, draw(key)), key
    )
    state = checkpoints.open(latest).restore(abstract, batches)
    logging.info('Going on from %s.', checkpoints.path(latest))
    return state, None
  if initial is None:
    model = draw(key)
  else:
    model = load_model(config, initial, key)
  create = jax.jit(partial(create_state, optimizer), donate_argnums=0)
  return create(model), None


def _start_adapters(
  config: Config,
  optimizer: optax.GradientTransformation,
  base: InitialModel,
  checkpoints: Checkpoints,
  batches: grain.DatasetIterator,
) -> tuple[TrainState, Decoder]:
  """As `_start_state`, of a run that trains adapters."""
  key = jax.random.key(config.seed)
  model = load_base(config, base, key)
  trained, frozen = split_trained(add_adapters(model, config.lora, key))
  create = jax.jit(partial(create_state, optimizer))
  latest = checkpoints.latest()
  if latest is None:
    return create(trained), frozen
  abstract = jax.eval_shape(create, trained)
  state = checkpoints.open(latest).restore(abstract, batches)
  logging.info('Going on from %s.', checkpoints.path(latest))
  return state, frozen


def _report_plan(config: Config, pipeline: Pipeline) -> None:
  """Says how often the run sees its data, and in which shapes."""
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


def _evaluate_before(
  workdir: epath.Path,
  evaluation: HeldOutEvaluation,
  model: Decoder,
  start: int,
) -> dict[str, float] | None:
  """Evaluates the baselines and, from step 0, the model that it begins with."""
  path = workdir / 'evaluation.json'
  if start and _has_evaluation(path):
    return None
  logging.info('Evaluating before training.')
  before = evaluation.evaluate(model) if not start else None
  _write_json(path, {'before': before, **evaluation.baselines()})
  return before


def _has_evaluation(path: epath.Path) -> bool:
  """Whether a run that goes on has the figures of its start."""
  if not path.exists():
    return False
  try:
    if 'before' in json.loads(path.read_text()):
      return True
  except (ValueError, TypeError) as error:
    logging.warning(
      '%s is damaged (%s): it is written anew, without the figures from before '
      'training.', path, error,
    )  # fmt: skip
  return False


def _evaluate_after(
  workdir: epath.Path, evaluation: HeldOutEvaluation, model: Decoder
) -> dict[str, Any]:
  """Evaluates the trained model, and prints the whole evaluation."""
  path = workdir / 'evaluation.json'
  after = evaluation.evaluate(model)
  examples = evaluation.show_examples(model)
  results = json.loads(path.read_text())
  results = {'before': results.pop('before'), 'after': after, **results}
  _write_json(path, results)
  if processes.is_first():
    print(_table(results))
    print(examples)
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
  if processes.is_first():
    write_json(path, value)


if __name__ == '__main__':
  cli.main(
    make_parser(),
    start,
    config=True,
    less_memory='memory.remat=full, memory.chunk_rows, smaller batches and '
    'more devices in mesh.fsdp',
  )
