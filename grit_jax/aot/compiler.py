"""Compiles a step in a process of its own, and reads what it dumped.

Nine tenths of a compilation come after memory is assigned and the program is
scheduled. The fast mode ends the process there.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

from grit_jax.aot import collectives, hlo, memory
from grit_jax.aot.program import Sizes
from grit_jax.aot.topologies import find_chip
from grit_jax.config import Config
from grit_jax.errors import UserError

# The TPU compiler on a machine without a TPU; read when it is loaded.
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  # Of other compilers: this one ends at a flag that it does not know.
  'XLA_FLAGS': '',
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
  # A program from a cache would have no dump.
  'JAX_ENABLE_COMPILATION_CACHE': '0',
  # Other processes may use it too.
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  # What a TPU's machine would be asked.
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
}

# Written last before code is generated.
_SCHEDULED = 'after_optimizations_after_buffer_assignment.txt'
_ASSIGNMENT = 'after_optimizations-buffer-assignment.txt'


class CompileError(UserError):
  """A step that cannot be compiled, for another reason than memory."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What to compile.

  Attributes:
    config: of the run.
    topology: such as `v5e:8x8`.
    slices: how many of these.
    sizes: packed rows of the step.
    full: generate code too: exact memory, and the certainty that it compiles.
    options: XLA's, besides those of `xla_options`.
  """

  config: Config
  topology: str
  slices: int
  sizes: Sizes
  full: bool = False
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


def compile_step(request: Request) -> dict[str, Any]:
  """Returns the figures of a compiled step, as `--output` writes them.

  Raises:
    CompileError: it cannot be compiled, for another reason than memory.
    UserError: there is no such topology.
  """
  chip = find_chip(request.topology)
  _check_libtpu()
  with tempfile.TemporaryDirectory(prefix='grit_jax_aot.') as name:
    folder = pathlib.Path(name)
    seconds, outcome = _run(request, folder, chip.hbm_gib)
    if 'error' in outcome:
      raise CompileError(outcome['error'])
    program = json.loads((folder / 'program.json').read_text())
    read = _read(request, folder / 'dump', program)
  figures = {
    'fits': True,
    'hbm_gib_per_chip': read['totals'][memory.HBM] / 2**30,
    'host_gib_per_chip': read['totals'][memory.HOST] / 2**30,
  }
  figures |= {k: v for k, v in outcome.items() if v is not None}
  return {
    'topology': request.topology,
    'slices': request.slices,
    'mesh': program['mesh'],
    **program['sizes'],
    'memory': dataclasses.asdict(request.config.memory),
    'mode': 'full' if 'compile_seconds' in outcome else 'fast',
    **figures,
    'hbm_limit_gib': chip.hbm_gib,
    'executed_petaflops': program['executed_petaflops'],
    'ideal_petaflops': program['ideal_petaflops'],
    'ideal_forward_passes': program['ideal_forward_passes'],
    'executed_over_ideal_flops': (
      program['executed_petaflops'] / program['ideal_petaflops']
    ),
    'held': read['held'],
    'buffers': read['buffers'],
    'largest_logits_gib': read['largest_logits_gib'],
    'collectives': read['collectives'],
    'kernels': read['kernels'],
    'compile_seconds': seconds,
  }


def _check_libtpu() -> None:
  if importlib.util.find_spec('libtpu') is None:
    raise CompileError(
      "the TPU compiler is missing: pip install 'grit_jax[aot]', or "
      'pip install libtpu.'
    )


def _run(
  request: Request, folder: pathlib.Path, limit_gib: float
) -> tuple[float, dict[str, Any]]:
  """Runs the worker to its end, or to where memory is known."""
  values = dataclasses.asdict(request)
  (folder / 'request.json').write_text(json.dumps(values))
  log = folder / 'log'
  start = time.monotonic()
  with open(log, 'w') as output:
    worker = subprocess.Popen(
      [sys.executable, '-m', 'grit_jax.aot.worker', str(folder)],
      stdout=output,
      stderr=subprocess.STDOUT,
      env=os.environ | _ENVIRONMENT,
    )
  try:
    while worker.poll() is None:
      time.sleep(0.1)
      if not request.full and _is_scheduled(folder / 'dump', limit_gib):
        return time.monotonic() - start, {}
  finally:
    worker.kill()
    worker.wait()
  outcome = folder / 'outcome.json'
  if not outcome.exists():
    lines = log.read_text().splitlines()
    raise CompileError('the compiler failed:\n' + '\n'.join(lines[-15:]))
  return time.monotonic() - start, json.loads(outcome.read_text())


def _is_scheduled(dump: pathlib.Path, limit_gib: float) -> bool:
  """Whether the program is dumped to its end, and fits.

  One that does not is left to the compiler, which says so by itself.
  """
  scheduled = memory.find_dump(dump, _SCHEDULED)
  assignment = memory.find_dump(dump, _ASSIGNMENT)
  if not (scheduled and assignment):
    return False
  if not scheduled.read_text().endswith('}\n\n'):
    return False
  totals = memory.read_totals(assignment.read_text())
  return totals[memory.HBM] <= limit_gib * 2**30


def _read(
  request: Request, dump: pathlib.Path, program: dict[str, Any]
) -> dict[str, Any]:
  """Reads memory, collectives and kernels from the compiler's dump."""

  def text(suffix: str) -> str:
    path = memory.find_dump(dump, suffix)
    if path is None:
      raise CompileError(f'the compiler has dumped no {suffix}.')
    return path.read_text()

  module = hlo.parse(text('.after_optimizations.txt'))
  assignment = text(_ASSIGNMENT)
  totals = memory.read_totals(assignment)
  buffers, logits = memory.read_buffers(
    assignment, text('after_optimizations-live-range.txt'), module, program
  )
  held: dict[str, float] = defaultdict(float)
  for buffer in buffers:
    held[buffer['holds']] += buffer['gib']
  rest = totals[memory.HBM] / 2**30 - sum(held.values())
  held['gaps between buffers'] = max(rest, 0.0)
  chips = math.prod(program['mesh'].values())
  moved = collectives.find_collectives(
    module, program['loops'], chips // request.slices, request.slices
  )
  kernels: dict[str, int] = defaultdict(int)
  for computation in module.computations.values():
    for instruction in computation:
      if collectives.is_kernel(instruction):
        kernels[_kernel_name(instruction)] += 1
  return {
    'totals': totals,
    'held': dict(sorted(held.items(), key=lambda item: -item[1])),
    'buffers': buffers[:60],
    'largest_logits_gib': logits,
    'collectives': [dataclasses.asdict(each) for each in moved],
    'kernels': dict(sorted(kernels.items())),
  }


def _kernel_name(instruction: hlo.Instruction) -> str:
  """Returns a kernel's name without the number of its use."""
  return instruction.name.rstrip('0123456789').rstrip('.')
