"""Compares adapters with full fine-tuning, and a quantised base with its own.

  python -m grit_jax.train --config=configs/quickstart.py \
    --workdir=runs/quickstart
  python benchmarks/lora.py --base=runs/quickstart

takes the quickstart's trained model, and trains it on for `--steps` steps in
every way: all weights, and adapters over it in float32, bfloat16, int8 and nf4.
Steps a second leave out the first steps, which compile. GiB are what the
compiler assigns to the step: its arguments (weights, optimizer state, batch),
its results and all between. State is what a checkpoint has.

Then it compares, over the first step's texts and with random numbers for the
adapters' second factors: the cosines of embeddings with those of the base in
bfloat16, and the adapters' gradient with that over the base in float32.
"""

import dataclasses
import importlib.util
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath

from grit_jax import config as configuration
from grit_jax import objective, optimizer, sharding
from grit_jax.batch import Batch
from grit_jax.config import Config, LoraConfig
from grit_jax.data import records
from grit_jax.data.filling import RowShards
from grit_jax.data.pipeline import Pipeline, place_batch
from grit_jax.data.preparation import prepare_data
from grit_jax.data.sources import TRAIN, sources
from grit_jax.initial import (
  InitialModel,
  load_base,
  load_model,
  open_initial,
  take_architecture,
)
from grit_jax.logs import quiet_libraries
from grit_jax.models.attention import embedding_kind
from grit_jax.models.decoder import Decoder
from grit_jax.models.lora import add_adapters, join_trained, split_trained
from grit_jax.xla_options import compiler_options

_BASE = flags.DEFINE_string('base', None, "The quickstart's workdir.")
_STEPS = flags.DEFINE_integer('steps', 20, 'Steps that are timed.')
_RANK = flags.DEFINE_integer('rank', 16, 'Of the adapters.')
_OUTPUT = flags.DEFINE_string('output', '', 'A JSON file for the figures.')

BASES = ('float32', 'bfloat16', 'int8', 'nf4')
# Of the second factors, beside weights of 0.02 to 0.1.
SECOND = 0.02
WARM_UP = 2


def main(argv: list[str]) -> None:
  """Measures, prints a table, and writes the figures."""
  quiet_libraries()
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  initial = open_initial(_BASE.value)
  config = make_config(initial)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    hosts = make_batches(config, initial, mesh)
    results: dict[str, Any] = {
      'device': mesh.devices.flat[0].device_kind,
      'devices': mesh.size,
      'model': dataclasses.asdict(config.model),
      'rank': _RANK.value,
      'training': {'all weights': train(config, initial, hosts)},
      'quantised': compare(config, initial, hosts[0]),
    }
    for base in BASES:
      results['training'][f'adapters, {base}'] = train(
        with_base(config, base), initial, hosts
      )
  print(describe(results))
  if _OUTPUT.value:
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(results, indent=2) + '\n')


def make_config(initial: InitialModel) -> Config:
  """Returns the quickstart's configuration, on its own trained model."""
  path = pathlib.Path(__file__).parents[1] / 'configs' / 'quickstart.py'
  spec = importlib.util.spec_from_file_location('quickstart', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = configuration.resolve(module.get_config())
  config = dataclasses.replace(
    config,
    init_from=_BASE.value,
    steps=_STEPS.value + WARM_UP,
    # One shape for all steps.
    data=dataclasses.replace(config.data, row_buckets=1),
  )
  return take_architecture(config, initial)


def with_base(config: Config, base: str) -> Config:
  """Returns the configuration of adapters over a base that is kept so."""
  lora = LoraConfig(rank=_RANK.value, alpha=2.0 * _RANK.value, base=base)
  return dataclasses.replace(config, lora=lora)


def make_batches(
  config: Config, initial: InitialModel, mesh: jax.sharding.Mesh
) -> list[Batch]:
  """Returns the batches of all steps, on the devices."""
  workdir = epath.Path(_BASE.value)
  found = sources(config.data.paths, workdir / 'tfds')
  sets = prepare_data(config, workdir, found, initial.tokenizer, TRAIN)
  pipeline = Pipeline(
    config,
    sets[records.EMBEDDING],
    sets[records.GENERATIVE],
    RowShards(sharding.row_shards(mesh), sharding.own_row_shards(mesh)),
  )
  return [
    place_batch(mesh, pipeline.build(step).batch)
    for step in range(config.steps)
  ]


def load(config: Config, initial: InitialModel) -> tuple:
  """Returns what is trained, and the frozen rest."""
  key = jax.random.key(config.seed)
  if not config.lora.rank:
    return load_model(config, initial, key), None
  base = load_base(config, initial, key)
  return split_trained(add_adapters(base, config.lora, key))


def train(
  config: Config, initial: InitialModel, batches: list[Batch]
) -> dict[str, float]:
  """Trains for all batches; returns the figures of that."""
  trained, frozen = load(config, initial)
  transformation = optimizer.make_optimizer(config.optimizer, config.steps)
  options = compiler_options(jax.devices()[0].device_kind)
  step = objective.make_train_step(
    config,
    transformation,
    optimizer.make_schedule(config.optimizer, config.steps),
    options,
  )
  state = jax.jit(lambda model: objective.create_state(transformation, model))(
    trained
  )
  step = step.lower(state, batches[0], frozen).compile()
  memory = step.memory_analysis()
  seconds = []
  for batch in batches:
    start = time.perf_counter()
    state, metrics = step(state, batch, frozen)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - start)
  return {
    # The median: what else the machine does shows in some steps alone.
    'steps_per_second': float(1 / np.median(seconds[WARM_UP:])),
    'gib': (
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )
    / 2**30,
    'state_mib': sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20,
    'weights_mib': sum(
      x.nbytes for x in jax.tree.leaves(join_trained(state.model, frozen))
    )
    / 2**20,
    'loss_of_last_step': float(metrics['loss']),
  }


def compare(
  config: Config, initial: InitialModel, batch: Batch
) -> dict[str, dict[str, float]]:
  """Compares embeddings and gradients over each base."""
  embeddings, gradients = {}, {}
  for base in BASES:
    own = with_base(config, base)
    trained, frozen = load(own, initial)
    model = join_trained(trained, frozen)
    embeddings[base] = jax.jit(embed, static_argnums=2)(model, batch, own)
    trained = jax.tree_util.tree_map_with_path(fill, trained)
    gradient, _ = jax.jit(objective.one_pass_gradient, static_argnums=2)(
      trained, batch, own, frozen
    )
    gradients[base] = np.concatenate(
      [np.asarray(x).ravel() for x in jax.tree.leaves(gradient)]
    )
  results = {}
  reference = gradients['float32']
  for base in BASES[2:]:
    cosines = np.asarray((embeddings[base] * embeddings['bfloat16']).sum(-1))
    gradient = gradients[base]
    results[base] = {
      'cosine_mean': float(cosines.mean()),
      'cosine_least': float(cosines.min()),
      'gradient_cosine': float(
        gradient @ reference
        / np.linalg.norm(gradient) / np.linalg.norm(reference)
      ),
      'gradient_error': float(
        np.linalg.norm(gradient - reference) / np.linalg.norm(reference)
      ),
    }  # fmt: skip
  return results


def fill(path: tuple, x: jax.Array) -> jax.Array:
  """Returns random numbers in place of a second factor, which is zero."""
  if getattr(path[-2], 'name', None) != 'b':
    return x
  return SECOND * jax.random.normal(
    jax.random.key(0), x.shape, out_sharding=jax.typeof(x).sharding
  )


def embed(model: Decoder, batch: Batch, config: Config) -> jax.Array:
  """Returns the embeddings of a batch's texts, of length 1."""
  rows = batch.embedding
  [hidden] = model([rows.rows], [embedding_kind(config.model.attention)])
  pooled = objective.pool_texts(
    model, hidden, rows.rows, config.data.max_segments
  )
  flat = pooled.reshape(
    -1, pooled.shape[-1], out_sharding=sharding.spec('rows', None)
  )
  slots = jnp.concatenate([rows.query_slots, rows.passage_slots.reshape(-1)])
  found = flat.at[slots].get(out_sharding=sharding.spec('texts', None))
  return found / jnp.linalg.norm(found, axis=-1, keepdims=True)


def describe(results: dict[str, Any]) -> str:
  """Returns the figures as tables to be read."""
  lines = [f'{results["devices"]} x {results["device"]}']
  for part in 'training', 'quantised':
    names = list(next(iter(results[part].values())))
    lines += ['', ''.join([f'{part:20}', *(f'{name:>19}' for name in names)])]
    for row, values in results[part].items():
      cells = [f'{values[name]:19.5f}' for name in names]
      lines.append(''.join([f'{row:20}', *cells]))
  return '\n'.join(lines)


if __name__ == '__main__':
  flags.mark_flags_as_required(['base'])
  app.run(main)
