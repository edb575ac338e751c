"""The mesh, the one table of logical axes, and what moves between devices.

A run has one Explicit mesh with the axes `data`, `pair`, `fsdp`, `expert` and
`tensor`, so that the sharding of an array is part of its type and a wrong one
fails when the program is traced, on a CPU as on a pod. `pair` and `fsdp` are
the config's `mesh.fsdp`, halved where its half is even: see `gather`.

- Activations are split by rows over all axes but `tensor`, and by heads,
  feed-forward and vocabulary over `tensor`.
- A weight is stored split over `tensor` where its logical axis says so and,
  besides, over `fsdp`, `pair` and `expert` on its first axis: the major one, so
  that a shard stays whole tiles on a TPU. `gather` brings it together for use.
- The experts' weights are split by experts over `expert`, and are never
  brought together over it: the tokens go to them.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grit_jax.config import Config, MeshConfig, ModelConfig
from grit_jax.errors import UserError

AXES = ('data', 'pair', 'fsdp', 'expert', 'tensor')
# The axes that split rows, and over which a weight's gradient is summed.
ROWS = ('data', 'pair', 'fsdp', 'expert')
# The axes that split a weight's first axis, besides its own: the last of them
# are gathered first.
STORED = ('fsdp', 'pair', 'expert')

RULES: dict[str, str | tuple[str, ...] | None] = {
  'rows': ROWS,
  'seq': None,
  'embed': None,
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'mlp': 'tensor',
  'vocab': 'tensor',
  'experts': 'expert',
  'router': None,
  'rank': None,
  'layers': None,
  'texts': None,
  'projection': None,
}

# The embedding table and the head have their vocabulary rounded up to this
# multiple, so that any vocabulary splits over a pod: 256 is two lanes of a TPU
# tile, and divides every published Mistral, Mixtral and Llama vocabulary.
VOCAB_MULTIPLE = 256


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns the Explicit mesh that `config` asks for.

  Of several TPU slices each is a mesh of its own, and `data` goes over the
  network between them: a slice has a whole copy of the weights.

  Args:
    config: devices an axis, of one slice; an axis of -1 takes those left over.
    devices: by default all of the run's.

  Raises:
    UserError: the axes' product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  slices = 1
  if devices[0].platform == 'tpu':
    # The attribute is there where there are several.
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
  data, fsdp, expert, tensor = _sizes(config, len(devices) // slices, slices)
  pair = 2 if fsdp % 4 == 0 else 1
  shape = (data, pair, fsdp // pair, expert, tensor)
  # The halves of a torus's axis are neighbours; only v5e's are split unasked.
  if slices == 1:
    grid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_hybrid_device_mesh(
      shape, (slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _sizes(config: MeshConfig, devices: int, slices: int) -> list[int]:
  """Returns the devices of one slice an axis, as `make_mesh`."""
  axes = ('data', 'fsdp', 'expert', 'tensor')
  sizes = [getattr(config, axis) for axis in axes]
  fixed = math.prod(size for size in sizes if size > 0)
  named = ', '.join(f'mesh.{a}={n}' for a, n in zip(axes, sizes, strict=True))
  there = f'{devices} devices' + (' in each slice' if slices > 1 else '')
  if -1 in sizes:
    if devices % fixed:
      fits = [n for n in range(1, devices + 1) if devices % n == 0]
      raise UserError(
        f'{named}: {there} do not divide by {fixed}, so the axis of -1 has no '
        f'size. The product of the others must be one of {fits}.'
      )
    sizes[sizes.index(-1)] = devices // fixed
  elif fixed != devices:
    raise UserError(
      f'{named} is a mesh of {fixed} devices, but there are {there}. Set one '
      'axis to -1 to let it take the rest.'
    )
  return sizes


def platform() -> str:
  """Returns what the devices of the mesh in force are: tpu, gpu or cpu."""
  return jax.sharding.get_abstract_mesh().abstract_device.platform


def device_memory(mesh: Mesh) -> float:
  """Returns the bytes that a device of this process has; a CPU, its share."""
  device = mesh.local_devices[0]
  limit = (device.memory_stats() or {}).get('bytes_limit')
  if limit is not None:
    return limit
  machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return machine / len(mesh.local_devices)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
  """Returns the number of shards that rows are split into."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def own_row_shards(mesh: Mesh) -> tuple[int, ...]:
  """Returns which of the shards of rows are on this process's devices."""
  shards = NamedSharding(mesh, spec('rows'))
  indices = shards.addressable_devices_indices_map((row_shards(mesh),))
  parts = [index[0] for index in indices.values() if index is not None]
  return tuple(sorted({part.start or 0 for part in parts}))


def validate(config: Config, mesh: Mesh) -> None:
  """Checks that the model and the batch divide over the mesh.

  Raises:
    UserError: the message names the key, its size and the axis.
  """
  model = config.model
  for name in ('num_heads', 'num_kv_heads', 'mlp_dim'):
    _check_divides(f'model.{name}', getattr(model, name), mesh, ('tensor',))
  if model.num_experts:
    _check_divides('model.num_experts', model.num_experts, mesh, ('expert',))
  elif mesh.shape['expert'] > 1:
    raise UserError(
      f'mesh.expert={mesh.shape["expert"]}, but model.num_experts=0: there is '
      'nothing to split over it.'
    )
  _check_divides('model.embed_dim', model.embed_dim, mesh, STORED)
  shards = ('tensor', *STORED)
  _check_divides('model.mlp_dim', model.mlp_dim, mesh, shards)
  _check_divides(
    'model.num_heads*head_dim', model.num_heads * model.head_dim, mesh, shards
  )
  _check_divides(
    f'the vocabulary, padded to a multiple of {VOCAB_MULTIPLE},',
    padded_vocab(model),
    mesh,
    shards,
  )
  if config.lora.rank:
    # An adapter's second factor is split by outputs.
    _check_divides(
      'model.num_kv_heads*head_dim',
      model.num_kv_heads * model.head_dim,
      mesh,
      shards,
    )
  if config.memory.chunk_rows:
    _check_divides('memory.chunk_rows', config.memory.chunk_rows, mesh, ROWS)
  if config.evaluation.enabled:
    _check_divides('evaluation.rows', config.evaluation.rows, mesh, ROWS)


def count_shards(
  mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None
) -> int:
  """Returns the number of shards that some mesh axes split an axis into."""
  return math.prod(mesh.shape[name] for name in _names(axes))


def _check_divides(
  name: str, size: int, mesh: Mesh, axes: tuple[str, ...]
) -> None:
  shards = math.prod(mesh.shape[axis] for axis in axes)
  if size % shards:
    sizes = dict(mesh.shape) | {'fsdp': mesh.shape['fsdp'] * mesh.shape['pair']}
    product = '*'.join(
      f'mesh.{axis}' for axis in axes if axis != 'pair' and sizes[axis] > 1
    )
    raise UserError(f'{name}={size} does not divide by {product}={shards}.')


def padded_vocab(model: ModelConfig) -> int:
  """Returns the rows of the embedding table as stored."""
  return -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def spec(*logical: str | None) -> P:
  """Returns the PartitionSpec of an array with these logical axes.

  Raises:
    KeyError: an axis that is not in the table.
    ValueError: two axes of the array want the same mesh axis.
  """
  physical = [None if axis is None else RULES[axis] for axis in logical]
  _check_collision(logical, physical)
  return P(*physical)


def weight_spec(*logical: str) -> P:
  """Returns how a weight with these logical axes is stored.

  As `spec`, with `STORED` on the first axis after `layers` and `experts`. The
  latter has `expert` already.
  """
  first = sum(axis in ('layers', 'experts') for axis in logical)
  extra = STORED[:-1] if 'experts' in logical else STORED
  physical = [RULES[axis] for axis in logical]
  physical[first] = (*_names(physical[first]), *extra)
  _check_collision(logical, physical)
  return P(*physical)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes that one axis is split over."""
  return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _check_collision(logical: Sequence, physical: Sequence) -> None:
  flat = [axis for axes in physical for axis in _names(axes)]
  if len(flat) != len(set(flat)):
    raise ValueError(
      f'The logical axes {tuple(logical)} use a mesh axis twice: {physical}.'
    )


def gather(weight: Any, *logical: str, dtype: str) -> jax.Array:
  """All-gathers a stored weight over `STORED`, in `dtype`.

  A quantised weight is gathered as it is stored, and turned back after that;
  it has no gradient.

  Its transpose is a reduce-scatter of the gradient to the shard, in `dtype`:
  the result is `reduced` over the row axes, so its cotangent is the unreduced
  sum of each device, which the transposes of the reshards scatter. There are
  three of them, because XLA makes a full all-reduce of a reduce-scatter over
  all chips of a slice on v5e and v5p, and of one over `data` too: `data`
  first, which moves nothing; then over `pair`, half of the chips' shards; then
  over `fsdp`. What is split over `expert` by experts stays so.

  Args:
    weight: as stored (`weight_spec`), without its `layers` axis: an array, or
      a `models.quantization.QuantizedWeight`.
    *logical: its logical axes.
    dtype: the dtype to gather and to compute in.

  Returns:
    The weight, split over `tensor` alone, or over `expert` too.
  """
  expert = set() if 'experts' in logical else {'expert'}
  if not isinstance(weight, jax.Array):
    whole = {'pair', 'fsdp'} | expert
    weight = jax.tree.map(
      lambda x: jax.sharding.reshard(
        x, P(*_without(jax.typeof(x).sharding.spec, whole))
      ),
      weight,
    )
    return weight.decode(dtype)
  stored = weight_spec(*logical)
  weight = weight.astype(dtype)
  reduced = {'data'}
  for axes in (set(), {'pair'} | expert, {'fsdp'}):
    reduced |= axes
    weight = jax.sharding.reshard(
      weight, P(*_without(stored, reduced), reduced=reduced)
    )
  return weight


def _without(spec: P, axes: set[str]) -> list[tuple | str | None]:
  """Returns the partitions of `spec` over other mesh axes than these."""
  kept = []
  for partition in spec:
    names = tuple(name for name in _names(partition) if name not in axes)
    kept.append(names if len(names) > 1 else names[0] if names else None)
  return kept


def _rest(x: jax.Array) -> tuple:
  """Returns how the axes after the rows are split."""
  partitions = jax.typeof(x).sharding.spec[1:]
  return (*partitions, *(None,) * (x.ndim - 1 - len(partitions)))


def _by_shard(x: jax.Array) -> jax.Array:
  """Views [R, ...] as [shards, R / shards, ...], which moves nothing."""
  shards = row_shards(jax.sharding.get_abstract_mesh())
  return x.reshape(
    shards, -1, *x.shape[1:], out_sharding=P(ROWS, None, *_rest(x))
  )


def join_rows(streams: Sequence[jax.Array]) -> jax.Array:
  """Concatenates streams of rows, [R_i, ...] each, within every shard.

  Each shard then holds its rows of the first stream, of the second, and so on:
  a concatenation of the global arrays would move rows between devices. The
  axes after the rows keep their sharding.
  """
  if len(streams) == 1:
    return streams[0]
  x = jnp.concatenate([_by_shard(x) for x in streams], axis=1)
  return x.reshape(-1, *x.shape[2:], out_sharding=P(ROWS, *_rest(streams[0])))


def split_rows(x: jax.Array, rows: Sequence[int]) -> list[jax.Array]:
  """Undoes `join_rows`: [sum(rows), ...] to one [rows_i, ...] a stream."""
  if len(rows) == 1:
    return [x]
  view, parts, start = _by_shard(x), [], 0
  for count in rows:
    stop = start + count // view.shape[0]
    parts.append(
      view[:, start:stop].reshape(
        count, *x.shape[1:], out_sharding=P(ROWS, *_rest(x))
      )
    )
    start = stop
  return parts


def place(mesh: Mesh, array: np.ndarray, *logical: str | None) -> jax.Array:
  """Puts a host's copy of a global array on the mesh, a shard a device."""
  sharding = NamedSharding(mesh, spec(*logical))
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def place_rows(mesh: Mesh, array: np.ndarray) -> jax.Array:
  """Puts rows on the mesh, of which each process has its devices' alone.

  Args:
    mesh: of all processes.
    array: [R, T] or [chunks, R, T] with this process's rows, shard by shard in
      the order of `own_row_shards`.
  """
  axis = array.ndim - 2
  own = own_row_shards(mesh)
  size = array.shape[axis] // len(own)
  shape = list(array.shape)
  shape[axis] = size * row_shards(mesh)
  sharding = NamedSharding(mesh, spec(*(None,) * axis, 'rows', 'seq'))

  def take(index: tuple[slice, ...]) -> np.ndarray:
    start = own.index((index[axis].start or 0) // size) * size if size else 0
    return array[*index[:axis], start : start + size]

  # JAX's types allow for an index None, which no shard of an array has.
  return jax.make_array_from_callback(tuple(shape), sharding, take)  # type: ignore[arg-type]
