"""Says in words and tables what a compiled step holds, computes and moves."""

import math
from collections.abc import Sequence
from typing import Any

from grit_jax.aot.topologies import find_chip

# Assumptions of the estimate of a step's time.
PRODUCTS_SHARE = 0.7  # of the peak that products and kernels run at
LINKS_SHARE = 0.7  # of the links' published rate
BETWEEN_SLICES = 3e9  # bytes a second and chip, of a network of 100 Gb/s a host


def estimate_seconds(figures: dict[str, Any]) -> dict[str, float]:
  """Estimates a step: the products, and the transfers that nothing hides."""
  chip = find_chip(figures['topology'])
  chips = math.prod(figures['mesh'].values())
  products = figures['executed_petaflops'] / chips / chip.petaflops
  exposed = sum(
    transfer_seconds(each, chip.links)
    for each in figures['collectives']
    if not each['hidden']
  )
  seconds = {
    'products': products / PRODUCTS_SHARE,
    'transfers_not_hidden': exposed,
  }
  return seconds | {'step': sum(seconds.values())}


def transfer_seconds(collective: dict[str, Any], links: float) -> float:
  """Estimates the time of a collective, all its times in a step together."""
  group = max(collective['group'], 2)
  moved = collective['bytes'] * (group - 1) / group * collective['times']
  if collective['kind'] == 'all-reduce':
    moved *= 2
  rate = BETWEEN_SLICES if collective['between_slices'] else LINKS_SHARE * links
  return moved / rate


def describe(figures: dict[str, Any]) -> str:
  """Returns the report of one step."""
  axes = ', '.join(f'{axis} {n}' for axis, n in figures['mesh'].items())
  used, limit = figures['hbm_gib_per_chip'], figures['hbm_limit_gib']
  verdict = 'fits' if figures['fits'] else 'DOES NOT FIT'
  kind = {
    'fast': 'as assigned, before code is generated',
    'full': 'of the compiled program',
  }[figures['mode'] if figures['fits'] else 'fast']
  lines = [
    f'{figures["slices"]} x {figures["topology"]}, mesh of {axes}',
    f'rows a step: {figures["embedding_rows"]} embedding, '
    f'{figures["generative_rows"]} generative; '
    f'memory.remat={figures["memory"]["remat"]}, '
    f'memory.chunk_rows={figures["memory"]["chunk_rows"]}',
    '',
    f'{verdict}: {used:.2f} of {limit:.2f} GiB a chip ({kind})',
  ]
  if figures['host_gib_per_chip'] > 0.01:
    lines.append(f'in the memory of hosts: {figures["host_gib_per_chip"]:.2f}')
  lines += _table(
    ('GiB at the peak', 'held by'),
    [(f'{gib:.2f}', name) for name, gib in figures['held'].items()],
  )
  lines += _table(
    ('GiB', 'array', 'of', 'from'),
    [
      (f'{b["gib"]:.2f}', b['array'], b['holds'], _tail(b['path']))
      for b in figures['buffers'][:12]
    ],
  )
  lines += [
    '',
    f'executed over ideal FLOPs: {figures["executed_over_ideal_flops"]:.3f} '
    f'({figures["executed_petaflops"]:.1f} over '
    f'{figures["ideal_petaflops"]:.1f} PFLOP a step; ideal is '
    f'{figures["ideal_forward_passes"]} forward passes)',
  ]
  lines += _table(
    ('times', 'MiB each', 'chips', 'what', 'of', 'in', 'runs'),
    [
      (
        str(c['times']),
        f'{c["bytes"] / 2**20:.0f}',
        str(c['group']),
        c['kind'],
        c['result'] if len(c['result']) < 40 else c['result'][:37] + '...',
        c['phase'],
        _manner(c),
      )
      for c in figures['collectives']
    ],
  )
  lines += _table(
    ('kernels in the program', ''),
    [(name, str(count)) for name, count in figures['kernels'].items()],
  )
  seconds = figures['estimated_seconds']
  lines += [
    '',
    f'estimated step: {seconds["step"]:.2f} s = {seconds["products"]:.2f} s of '
    f'products + {seconds["transfers_not_hidden"]:.2f} s of transfers that '
    'nothing hides. Assumed, not measured:',
    f'  products at {PRODUCTS_SHARE:.0%} of the peak of '
    f'{1000 * find_chip(figures["topology"]).petaflops:.0f} TFLOP/s; links at '
    f'{LINKS_SHARE:.0%} of {find_chip(figures["topology"]).links / 1e9:.0f} '
    f'GB/s a chip, {BETWEEN_SLICES / 1e9:.0f} GB/s between slices; what is '
    'hidden costs nothing.',
    f'compiled in {figures["compile_seconds"]:.0f} s',
  ]
  return '\n'.join(lines)


def _manner(collective: dict[str, Any]) -> str:
  if collective['hidden']:
    return 'beside products'
  return 'asynchronous' if collective['asynchronous'] else 'alone'


def _tail(path: str) -> str:
  """Returns the end of a path of scopes, without what all have."""
  parts = [p for p in path.split('/') if p not in ('closed_call', 'body')]
  return '/'.join(parts[-3:])[:50]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Aligns columns; numbers stand first."""
  if not rows:
    return []
  table = [header, *rows]
  widths = [max(len(row[i]) for row in table) for i in range(len(header))]
  lines = [
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in table
  ]
  return ['', *(line.rstrip() for line in lines)]


def describe_sweep(found: Sequence[dict[str, Any]]) -> str:
  """Returns the table of a sweep, what fits and is fast first."""
  rows = []
  for figures in found:
    mesh = ' '.join(f'{a}={n}' for a, n in figures['mesh'].items() if n > 1)
    memory = figures['memory']
    rows.append((
      'yes' if figures['fits'] else 'no',
      f'{figures["hbm_gib_per_chip"]:.2f}',
      f'{figures["host_gib_per_chip"]:.2f}',
      f'{figures["executed_over_ideal_flops"]:.3f}',
      f'{figures["estimated_seconds"]["step"]:.2f}',
      mesh,
      memory['remat'],
      str(memory['chunk_rows']),
    ))  # fmt: skip
  header = (
    'fits', 'GiB a chip', 'host GiB', 'executed/ideal', 'estimated s', 'mesh',
    'remat', 'chunk_rows',
  )  # fmt: skip
  return '\n'.join(_table(header, rows))
