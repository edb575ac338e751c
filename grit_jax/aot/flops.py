"""Operations of a program, counted before it is compiled.

The compiler's own count takes the body of a loop once and a kernel for nothing.
"""

import math
from typing import Any


def count_flops(jaxpr: Any, shards: int, trips: int = 1) -> float:
  """Counts the operations of all products of a program.

  A flash kernel counts with all the blocks of its grid, those that a causal
  mask skips among them. Attention in plain operations counts one block of keys
  a block of queries, too little: what is read is known when it runs.

  Args:
    jaxpr: the program, or a part of it.
    shards: devices that run the body of a `shard_map`, which is one's.
    trips: of the loops of unknown length that are in no other loop; those
      within count once.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(x.aval, 'shape', ()) for x in equation.invars]
    out: list[tuple[int, ...]] = [
      getattr(x.aval, 'shape', ()) for x in equation.outvars[:1]
    ]
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      inner = math.prod(shapes[0][axis] for axis in contracted)
      total += 2 * math.prod(out[0]) * inner
    elif name.startswith('ragged_dot'):
      # [m, k] by [E, k, n], or the gradient of the latter, [E, k, n].
      total += 2 * math.prod(shapes[0]) * out[0][-1]
    elif name == 'cond':
      total += max(
        count_flops(branch.jaxpr, shards, trips)
        for branch in params['branches']
      )
    else:
      times, inner_trips = 1, trips
      if name == 'scan':
        times, inner_trips = params['length'], 1
      elif name == 'while':
        times, inner_trips = trips, 1
      elif name == 'shard_map':
        times = shards
      elif name == 'pallas_call':
        times = math.prod(params['grid_mapping'].grid)
      for value in params.values():
        for inner in value if isinstance(value, tuple | list) else [value]:
          inner = getattr(inner, 'jaxpr', inner)
          if hasattr(inner, 'eqns'):
            total += times * count_flops(inner, shards, inner_trips)
  return total
