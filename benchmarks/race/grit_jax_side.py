"""Our side of the race: what `python -m grit_jax.train` runs, on its data.

grit_jax_side.py prepare FOLDER   the start that both sides share
grit_jax_side.py race FOLDER      takes turns
"""

import dataclasses
import json
import pathlib
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from turns import forget_peak, measure_products, memory_mib, serve

from grit_jax import config as configuration
from grit_jax import optimizer as optimizers
from grit_jax import sharding
from grit_jax.checkpoint import Checkpoints
from grit_jax.config import Config
from grit_jax.convert.to_hf import to_hf
from grit_jax.data import records
from grit_jax.data.filling import RowShards
from grit_jax.data.pipeline import Pipeline, place_batch
from grit_jax.data.preparation import (
  fit_vocabulary,
  prepare_data,
  train_or_load_tokenizer,
)
from grit_jax.data.sources import TRAIN, sources
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.initial import load_model, open_initial, take_architecture
from grit_jax.models.decoder import Decoder
from grit_jax.objective import (
  cached_gradient,
  create_state,
  make_train_step,
  one_pass_gradient,
)
from grit_jax.xla_options import compiler_options


def read_config(folder: pathlib.Path) -> Config:
  """Returns the run's configuration."""
  return configuration.from_dict(
    json.loads((folder / 'config.json').read_text())
  )


def make_pipeline(
  config: Config,
  folder: pathlib.Path,
  tokenizer: Tokenizer,
  mesh: jax.sharding.Mesh,
) -> Pipeline:
  """Tokenizes the data, or opens it, and plans the run."""
  found = sources(config.data.paths)
  sets = prepare_data(config, folder, found, tokenizer, TRAIN)
  return Pipeline(
    config,
    sets[records.EMBEDDING],
    sets[records.GENERATIVE],
    RowShards.whole(sharding.row_shards(mesh)),
  )


def prepare(folder: pathlib.Path) -> None:
  """Writes the tokenized data, the first weights, and each step's texts.

  The weights are drawn here, saved as a checkpoint and exported: both sides
  start from the export.
  """
  config = read_config(folder)
  mesh = sharding.make_mesh(config.mesh)
  tokenizer = train_or_load_tokenizer(
    config, folder, sources(config.data.paths)
  )
  config = fit_vocabulary(config, tokenizer)
  pipeline = make_pipeline(config, folder, tokenizer, mesh)
  optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
  with jax.set_mesh(mesh), Checkpoints(folder / 'drawn', 1) as checkpoints:
    model = jax.jit(partial(Decoder, config.model))(jax.random.key(config.seed))
    checkpoints.save(
      0,
      create_state(optimizer, model),
      data_iterator=pipeline.iterate(),
      config=dataclasses.asdict(config),
      tokenizer=tokenizer.files,
      run={},
    )
    checkpoints.wait()
  to_hf(folder / 'drawn', folder / 'model')
  np.savez(folder / 'texts.npz', **collect_texts(pipeline))


def collect_texts(pipeline: Pipeline) -> dict[str, np.ndarray]:
  """Returns the tokens of each step's texts, before they become rows."""
  ids, talk_ids, in_loss = [], [], []
  lengths, instructions, talk_lengths = [], [], []
  for step in range(pipeline.config.steps):
    plan = pipeline.plan.embedding_step(step)
    for which, record, chosen in zip(
      plan.datasets, plan.records, plan.texts, strict=True
    ):
      [texts] = pipeline.plan.embedding[which].read([record])
      texts = [texts[place] for place in chosen]
      ids += [text.ids for text in texts]
      instructions += [text.instruction_length for text in texts]
      lengths += [len(text.ids) for text in texts]
    talks = pipeline.plan.generative_step(step)
    for which, record in zip(talks.datasets, talks.records, strict=True):
      [talk] = pipeline.plan.generative[which].read([record])
      talk_ids.append(talk.ids)
      in_loss.append(talk.in_loss)
      talk_lengths.append(len(talk.ids))
  data, steps = pipeline.config.data, pipeline.config.steps
  shape = (steps, data.embedding_batch, 1 + data.num_passages)
  return {
    'ids': np.concatenate(ids),
    'lengths': np.array(lengths).reshape(shape),
    'instruction_lengths': np.array(instructions).reshape(shape),
    'talk_ids': np.concatenate(talk_ids),
    'talk_in_loss': np.concatenate(in_loss),
    'talk_lengths': np.array(talk_lengths).reshape(steps, -1),
  }


class Race:
  """A run of training that is gone through again and again."""

  def __init__(self, folder: pathlib.Path):
    """Loads the shared start, as a run with `init_from` does."""
    self.libraries_mib = memory_mib('VmRSS')
    config = read_config(folder)
    self.mesh = sharding.make_mesh(config.mesh)
    initial = open_initial(folder / 'model')
    self.config = config = take_architecture(config, initial)
    self.pipeline = make_pipeline(config, folder, initial.tokenizer, self.mesh)
    optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
    self.options = compiler_options(self.mesh.devices.flat[0].device_kind)
    with jax.set_mesh(self.mesh):
      model = load_model(config, initial, jax.random.key(config.seed))
      create = jax.jit(partial(create_state, optimizer), donate_argnums=0)
      self.state = create(model)
    schedule = optimizers.make_schedule(config.optimizer, config.steps)
    self.step = make_train_step(config, optimizer, schedule, self.options)
    chunked = config.memory.chunk_rows > 0
    gradient = cached_gradient if chunked else one_pass_gradient
    self.gradient = jax.jit(
      partial(gradient, config=config), compiler_options=self.options
    )

  def run(self, backward_only: bool = False) -> dict[str, Any]:
    """Goes through all steps, as the training loop does.

    Args:
      backward_only: whether a step ends with its gradient.
    """
    forget_peak()
    tokens = computed = 0
    losses, pending = [], None
    start, cores = time.perf_counter(), time.process_time()
    with jax.set_mesh(self.mesh):
      for host in self.pipeline.iterate():
        batch = place_batch(self.mesh, host.batch)
        if backward_only:
          gradient, metrics = self.gradient(self.state.model, batch)
        else:
          self.state, metrics = self.step(self.state, batch)
        tokens += host.useful_tokens
        computed += host.computed_tokens
        # Never wait for the step just dispatched.
        if pending is not None:
          losses.append(_read_losses(pending))
        pending = metrics
      losses.append(_read_losses(pending))
    return {
      'seconds': time.perf_counter() - start,
      'core_seconds': time.process_time() - cores,
      'tokens': tokens,
      'computed': computed,
      'losses': losses,
      'peak_mib': self._peak_mib(),
      'libraries_mib': self.libraries_mib,
    }

  def _peak_mib(self) -> float:
    """Of the accelerator's memory, where there is one, since the start."""
    statistics = self.mesh.devices.flat[0].memory_stats()
    if statistics is None:
      return memory_mib('VmHWM')
    return statistics['peak_bytes_in_use'] / 2**20

  def products(self, shapes: list) -> list[dict[str, float]]:
    """Measures bare products in the dtype of the model."""

    def make(m: int, k: int, n: int) -> Any:
      key, dtype = jax.random.key(0), self.config.model.dtype
      x = jax.random.normal(key, (m, k), dtype)
      w = jax.random.normal(key, (k, n), dtype)
      y = jax.random.normal(key, (m, n), dtype)
      calls = {
        'forward': ('mk,kn->mn', x, w),
        'inputs': ('mn,kn->mk', y, w),
        'weights': ('mk,mn->kn', x, y),
      }
      product = jax.jit(
        jnp.einsum, static_argnums=0, compiler_options=self.options
      )
      return lambda name: product(*calls[name]).block_until_ready()

    return measure_products(shapes, make)


def _read_losses(metrics: dict[str, jax.Array]) -> tuple[float, float]:
  return float(metrics['loss_rep']), float(metrics['loss_gen'])


def main() -> None:
  """Prepares, or takes turns."""
  action, folder = sys.argv[1], pathlib.Path(sys.argv[2])
  if action == 'prepare':
    prepare(folder)
    return
  race = Race(folder)
  serve({'run': race.run, 'products': race.products})


if __name__ == '__main__':
  main()
