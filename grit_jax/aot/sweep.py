"""Tries executors and meshes of a config on a topology."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from grit_jax.aot.compiler import CompileError, Request, compile_step
from grit_jax.aot.program import Sizes
from grit_jax.aot.report import estimate_seconds
from grit_jax.aot.topologies import count_devices
from grit_jax.config import Config, MemoryConfig, MeshConfig

# Rows a chip and chunk of gradient caching.
CHUNKS = (8, 4, 2, 1)


def candidates(config: Config, chips: int) -> Iterator[Config]:
  """Yields the configuration with other `mesh` and `memory`.

  Args:
    config: says what is trained.
    chips: devices of a slice.
  """
  meshes = [MeshConfig(), MeshConfig(tensor=2)]
  if config.model.num_experts:
    meshes.append(MeshConfig(expert=math.gcd(config.model.num_experts, chips)))
  for mesh in meshes:
    memories = [MemoryConfig(remat='full'), MemoryConfig(remat='offload')]
    shards = chips // mesh.tensor
    memories.append(MemoryConfig(remat='offload', chunk_rows=4 * shards))
    memories += [MemoryConfig(chunk_rows=rows * shards) for rows in CHUNKS]
    for memory in memories:
      yield dataclasses.replace(config, mesh=mesh, memory=memory)


def sweep(
  request: Request, report: Callable[[str], None]
) -> list[dict[str, Any]]:
  """Compiles all candidates, and returns their figures, best first.

  Args:
    request: what to compile; its mesh and memory are replaced.
    report: is told what is not compiled, and why.
  """
  found = []
  chips = count_devices(request.topology)
  for config in candidates(request.config, chips):
    shards = request.slices * chips // config.mesh.tensor
    sizes = request.sizes
    if not config.memory.chunk_rows:
      sizes = Sizes(
        *(-(-n // shards) * shards for n in dataclasses.astuple(sizes))
      )
    else:
      config = dataclasses.replace(
        config,
        memory=dataclasses.replace(
          config.memory, chunk_rows=config.memory.chunk_rows * request.slices
        ),
      )
    try:
      figures = compile_step(
        dataclasses.replace(request, config=config, sizes=sizes)
      )
    except CompileError as error:
      report(f'{config.mesh}, {config.memory}: {error}')
      continue
    figures['estimated_seconds'] = estimate_seconds(figures)
    found.append(figures)
  return sorted(
    found,
    key=lambda each: (
      not each['fits'],
      each['estimated_seconds']['step'],
      each['hbm_gib_per_chip'],
    ),
  )
