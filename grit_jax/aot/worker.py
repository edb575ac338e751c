"""Compiles one step: the process that `compile_step` starts and may end.

`python -m grit_jax.aot.worker FOLDER` reads `request.json` there, and writes
`program.json` before it compiles, the compiler's dump in `dump/`, and
`outcome.json` at the end.
"""

import dataclasses
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax

from grit_jax import config as configuration
from grit_jax import sharding
from grit_jax.aot import program, topologies
from grit_jax.files import write_json
from grit_jax.models.lora import join_trained
from grit_jax.xla_options import compiler_options

# What the compiler says when memory is short.
_OUT_OF_MEMORY = re.compile(
  r'Ran out of memory in memory space hbm|CompileTimeHbmOom'
)
_USED = re.compile(r'\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)')


def main(folder: pathlib.Path) -> None:
  """Does what the request in `folder` says."""
  request = json.loads((folder / 'request.json').read_text())
  try:
    outcome = _compile(folder, request)
  except (
    configuration.ConfigError,
    sharding.UserError,
    topologies.UserError,
  ) as error:
    outcome = {'error': str(error)}
  _write(folder / 'outcome.json', outcome)


def _compile(folder: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
  config = configuration.from_dict(request['config'])
  topology = topologies.describe(request['topology'], request['slices'])
  mesh = sharding.make_mesh(config.mesh, topology.devices)
  sharding.validate(config, mesh)
  sizes = program.Sizes(**request['sizes'])
  kind = mesh.devices.flat[0].device_kind
  options = compiler_options(kind) | request['options']
  options |= {
    'xla_dump_to': str(folder / 'dump'),
    'xla_dump_hlo_as_text': True,
    'xla_dump_hlo_module_re': '.*train_step.*',
  }
  with jax.set_mesh(mesh):
    state, frozen = program.abstract_state(config, mesh)
    batch = program.abstract_batch(config, mesh, sizes)
    lowered = program.make_step(config, options).lower(state, batch, frozen)
    _write(
      folder / 'program.json',
      {
        'mesh': dict(mesh.shape),
        'device_kind': kind,
        'sizes': dataclasses.asdict(sizes),
        **program.measure_flops(config, mesh, state, frozen, sizes),
        **program.describe_shapes(
          config, mesh, join_trained(state.model, frozen), sizes
        ),
      },
    )
    start = time.monotonic()
    try:
      memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
      if not _OUT_OF_MEMORY.search(str(error)):
        raise
      used = _USED.search(str(error))
      return {
        'fits': False,
        'hbm_gib_per_chip': float(used[1]) if used else None,
        'message': str(error).splitlines()[0],
      }
  return {
    'fits': True,
    'hbm_gib_per_chip': (
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )
    / 2**30,
    'host_gib_per_chip': memory.host_temp_size_in_bytes / 2**30,
    'compile_seconds': time.monotonic() - start,
  }


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Writes JSON that is whole when it is there."""
  write_json(path, values)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
