"""Compiles a config's train step for a TPU topology, on a machine without one.

  pip install libtpu
  python benchmarks/compile_tpu.py --config=configs/gritlm_8x7b.py \
    --topology=v5p:4x4x2 --embedding_rows=512 --generative_rows=256

prints the memory a chip and the arithmetic executed over that of one forward
and one backward pass. Nothing runs: the figures are the compiler's.
"""

import json
import math
import os
import time
from typing import Any

# A TPU's compiler on a machine without a TPU; read when it is loaded.
os.environ |= {
  'JAX_PLATFORMS': 'cpu',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
}

import jax  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from grit_jax import config as configuration  # noqa: E402
from grit_jax import objective, optimizer, sharding  # noqa: E402
from grit_jax.batch import (  # noqa: E402
  Batch,
  EmbeddingRows,
  GenerativeRows,
  Rows,
)
from grit_jax.config import Config  # noqa: E402
from grit_jax.models.decoder import Decoder  # noqa: E402
from grit_jax.xla_options import compiler_options  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The configuration.')
_TOPOLOGY = flags.DEFINE_string('topology', None, 'Such as v5e:8x8.')
_EMBEDDING = flags.DEFINE_integer('embedding_rows', None, 'Rows of a step.')
_GENERATIVE = flags.DEFINE_integer('generative_rows', None, 'Rows of a step.')
_OUTPUT = flags.DEFINE_string('output', '', 'A JSON file for the figures.')


def main(argv: list[str]) -> None:
  """Compiles, and prints what the compiler says."""
  del argv
  values = _CONFIG.value
  values.data.paths = values.data.paths or 'unused'
  config = configuration.resolve(values)
  # Tori: without it the gathers of v5p become all-reduces. v5e has none.
  name = _TOPOLOGY.value
  wrap = {} if name.startswith('v5e') else {'wrap': (True, True, True)}
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=name, **wrap
  )
  mesh = sharding.make_mesh(config.mesh, topology.devices)
  sharding.validate(config, mesh)
  figures = compile_step(config, mesh, topology.devices[0])
  for key, value in figures.items():
    print(f'{key}: {value}')
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w') as file:
      json.dump(figures, file, indent=2)


def compile_step(
  config: Config, mesh: Mesh, device: jax.Device
) -> dict[str, Any]:
  """Returns the memory and the arithmetic of the compiled step."""
  batch = abstract_batch(config, mesh)
  transformation = optimizer.make_optimizer(config.optimizer, config.steps)
  step = objective.make_train_step(
    config,
    transformation,
    optimizer.make_schedule(config.optimizer, config.steps),
    compiler_options(device),
  )
  with jax.set_mesh(mesh):

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      spec = x.sharding.spec if x.sharding is not None else jax.P()
      stored = NamedSharding(mesh, spec)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stored)

    state = jax.tree.map(
      place,
      jax.eval_shape(
        lambda: objective.create_state(
          transformation, Decoder(config.model, jax.random.key(0))
        )
      ),
    )
    figures = {'devices': mesh.size, 'mesh': dict(mesh.shape)}
    if not config.memory.chunk_rows:
      shards = sharding.row_shards(mesh)
      executed = count_flops(step.trace(state, batch).jaxpr.jaxpr, shards)
      forward = count_flops(
        jax.make_jaxpr(lambda m, b: objective.one_pass_loss(m, b, config))(
          state.model, batch
        ).jaxpr,
        shards,
      )
      figures['executed_over_ideal_flops'] = executed / (3 * forward)
      figures['ideal_petaflops'] = 3 * forward / 1e15
    start = time.perf_counter()
    memory = step.lower(state, batch).compile().memory_analysis()
  gib = 2**30
  return figures | {
    'hbm_gib_per_chip': (
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )
    / gib,
    'state_and_batch_gib': memory.argument_size_in_bytes / gib,
    'temporary_gib': memory.temp_size_in_bytes / gib,
    'host_gib': memory.host_temp_size_in_bytes / gib,
    'compile_seconds': time.perf_counter() - start,
  }


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
  """Returns the types of a batch of the rows that the flags name."""
  data, chunk = config.data, config.memory.chunk_rows

  def make(shape: tuple, dtype: str, *logical: str | None):
    stored = NamedSharding(mesh, sharding.spec(*logical))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=stored)

  def rows(count: int, dtype: str):
    if not chunk:
      return make((count, data.row_length), dtype, 'rows', 'seq')
    shape = (-(-count // chunk), chunk, data.row_length)
    return make(shape, dtype, None, 'rows', 'seq')

  def stream(count: int) -> Rows:
    return Rows(*(rows(count, 'int32') for _ in range(3)), rows(count, 'bool'))

  chunks = make((), 'int32')
  pairs, passages = data.embedding_batch, data.num_passages
  embedding = EmbeddingRows(
    stream(_EMBEDDING.value),
    rows(_EMBEDDING.value, 'bool'),
    make((pairs,), 'int32', 'texts'),
    make((pairs, passages), 'int32', 'texts', None),
    make((pairs, pairs * passages), 'bool', 'texts', None),
    chunks,
  )
  generative = GenerativeRows(
    stream(_GENERATIVE.value), rows(_GENERATIVE.value, 'float32'), chunks
  )
  objective_ = config.objective
  return Batch(
    embedding if objective_.has_embedding else None,
    generative if objective_.has_generative else None,
  )


def count_flops(jaxpr: Any, shards: int) -> float:
  """Counts the operations of all products in a program.

  The body of a `shard_map` is one device's; the rows' shards all run it. A
  loop of unknown length counts once. A kernel's blocks all count, also those
  that it leaves out.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    shapes = [getattr(x.aval, 'shape', ()) for x in equation.invars]
    out = [getattr(x.aval, 'shape', ()) for x in equation.outvars[:1]]
    if name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      inner = math.prod(shapes[0][axis] for axis in contracted)
      total += 2 * math.prod(out[0]) * inner
    elif name.startswith('ragged_dot'):
      # [m, k] by [E, k, n], or the gradient of the latter, [E, k, n].
      total += 2 * math.prod(shapes[0]) * out[0][-1]
    else:
      times = equation.params['length'] if name == 'scan' else 1
      times *= shards if name == 'shard_map' else 1
      if name == 'pallas_call':
        times *= math.prod(equation.params['grid_mapping'].grid)
      for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else [value]:
          inner = getattr(inner, 'jaxpr', inner)
          if hasattr(inner, 'eqns'):
            total += times * count_flops(inner, shards)
  return total


if __name__ == '__main__':
  flags.mark_flags_as_required(
    ['config', 'topology', 'embedding_rows', 'generative_rows']
  )
  app.run(main)
