"""Frozen weights in fewer bytes: int8, or four bits as in QLoRA.

`quantize` puts a `QuantizedWeight` where a decoder has a projection's weight.
`sharding.gather`, through which every projection is read, moves its few bytes
and then turns it back, so that a device has one layer's weights at a time in
the dtype it multiplies in. There is no gradient for it.

- int8: symmetric, a scale an output channel, in float32.
- nf4: the 16 quantiles of a normal distribution (arXiv 2305.14314, appendix
  E), two to a byte, a scale a block of 64 inputs of an output channel, in
  bfloat16: its error is 1/50 of that of the codes.

Norms and the router stay as they are: they are a thousandth of the weights,
and a router's near ties decide. So do the embedding table, which is looked up
and not multiplied, and the head, whose errors are those of the logits: both
are 4% of a 7B's weights.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from grit_jax.errors import UserError
from grit_jax.models.decoder import Decoder
from grit_jax.models.projections import find_part, projection_axes
from grit_jax.sharding import count_shards, weight_spec

KINDS = ('int8', 'nf4')

BLOCK = 64  # inputs that share a scale
INT8_MAX = 127

# The quantiles are an odd number below zero and an even one above, with zero
# between them.
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
  0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip


@nnx.register_data_type
@partial(
  jax.tree_util.register_dataclass,
  data_fields=['values', 'scales'],
  meta_fields=['kind'],
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
  """A weight [..., I, O] that stands where an `nnx.Param` stands.

  Attributes:
    values: int8 [..., I, O]; of nf4, uint8 [..., I/2, O]: a byte has an input
      of a block's first half in its low bits, and that of the second in its
      high ones.
    scales: float32 [..., 1, O]; of nf4, bfloat16 [..., blocks, O].
    kind: One of `KINDS`.
  """

  values: jax.Array
  scales: jax.Array
  kind: str

  def __getitem__(self, index: object) -> 'QuantizedWeight':
    """Returns itself for `[...]`, by which an `nnx.Param` is read."""
    if index is not Ellipsis:
      raise TypeError(f'A quantised weight is read whole, not by {index!r}.')
    return self

  def decode(self, dtype: str) -> jax.Array:
    """Returns the weight, with the sharding of `values`."""
    if self.kind == 'int8':
      weight = self.values.astype(jnp.float32) * self.scales
    else:
      weight = _decode_nf4(self.values, self.scales)
    return jax.lax.stop_gradient(weight.astype(dtype))


def quantize(model: Decoder, kind: str) -> Decoder:
  """Returns the decoder with its projections quantised; see the module.

  To read a model that does not fit before that, `initial.load_model` quantises
  each weight as it is read.

  Args:
    model: On the current mesh; its own weights stay as they are.
    kind: One of `KINDS`.

  Raises:
    UserError: A projection's blocks or bytes do not divide over the mesh.
  """
  return put_weights(
    model,
    {
      path: quantize_weight(find_part(model, path)[...], logical, kind)
      for path, logical in projection_axes(model.config).items()
    },
  )


def put_weights(
  model: Decoder, weights: Mapping[str, QuantizedWeight]
) -> Decoder:
  """Returns the decoder with quantised weights in place of its own, by path."""
  # Modules of its own, with the same arrays.
  model = jax.tree.map(lambda x: x, model)
  for path, weight in weights.items():
    parent, _, name = path.rpartition('/')
    setattr(find_part(model, parent), name, weight)
  return model


def quantize_weight(
  weight: jax.Array, logical: tuple[str, ...], kind: str
) -> QuantizedWeight:
  """Quantises one weight, a layer at a time.

  Args:
    weight: [L, ..., I, O], stored as `sharding.weight_spec` says.
    logical: Its logical axes; the first is `layers`.
    kind: One of `KINDS`.

  Raises:
    UserError: The blocks or the bytes do not divide over the mesh.
  """
  if kind not in KINDS:
    raise ValueError(f'{kind!r} is not one of {", ".join(KINDS)}.')
  if kind == 'nf4':
    _check_divides(weight.shape[-2], logical)
  return _quantize(weight, logical, kind)


@partial(jax.jit, static_argnames=('logical', 'kind'))
def _quantize(
  weight: jax.Array, logical: tuple[str, ...], kind: str
) -> QuantizedWeight:
  encode = _encode_int8 if kind == 'int8' else _encode_nf4
  encode = partial(encode, stored=weight_spec(*logical[1:]))
  values, scales = jax.lax.map(encode, weight)
  return QuantizedWeight(values, scales, kind)


def block_size(inputs: int) -> int:
  """Returns how many inputs share a scale: a power of two that divides them."""
  return min(inputs & -inputs, BLOCK)


def _check_divides(inputs: int, logical: tuple[str, ...]) -> None:
  mesh = jax.sharding.get_abstract_mesh()
  split = weight_spec(*logical)[-2]
  blocks = inputs // block_size(inputs)
  for what, size, axes in (
    (f'blocks of {block_size(inputs)} inputs', blocks, _tensor(split)),
    ('bytes an output channel', inputs // 2, split),
  ):
    shards = count_shards(mesh, axes)
    if inputs % 2 or size % shards:
      raise UserError(
        f'A weight of {inputs} inputs on the axes {logical} has {size} {what} '
        f'in nf4, which do not divide over the {shards} devices of the mesh '
        f'axes {axes}. int8 has no blocks.'
      )


def _tensor(split: str | tuple[str, ...] | None) -> str | None:
  """Returns `tensor` if an axis is split over it: `gather` leaves it so."""
  names = split if isinstance(split, tuple) else (split,)
  return 'tensor' if 'tensor' in names else None


def _encode_int8(weight: jax.Array, stored: P) -> tuple[jax.Array, jax.Array]:
  """Returns values and scales of one layer's weight, [..., I, O]."""
  weight = weight.astype(jnp.float32)
  largest = jnp.max(jnp.abs(weight), axis=-2, keepdims=True)
  # A channel of zeros stays one.
  scales = jnp.where(largest > 0, largest, 1.0) / INT8_MAX
  values = jnp.round(weight / scales).astype(jnp.int8)
  return jax.sharding.reshard(values, stored), scales


def _encode_nf4(weight: jax.Array, stored: P) -> tuple[jax.Array, jax.Array]:
  """Returns values and scales of one layer's weight, [..., I, O]."""
  *leading, inputs, outputs = weight.shape
  size = block_size(inputs)
  blocks = inputs // size
  *first, split, last = stored
  # Where blocks divide over the devices, each device has whole ones.
  shards = count_shards(jax.sharding.get_abstract_mesh(), split)
  if blocks % shards:
    split = _tensor(split)
    weight = jax.sharding.reshard(weight, P(*first, split, last))
  weight = weight.astype(jnp.float32).reshape(
    *leading, blocks, size, outputs,
    out_sharding=P(*first, split, None, last),
  )  # fmt: skip
  largest = jnp.max(jnp.abs(weight), axis=-2)
  scales = jnp.where(largest > 0, largest, 1.0).astype(jnp.bfloat16)
  relative = weight / scales[..., None, :].astype(jnp.float32)
  # The nearest code: how many of the middles between two lie below.
  codes = jnp.zeros(relative.shape, jnp.uint8, out_sharding=_spec(relative))
  for low, high in zip(NF4[:-1], NF4[1:], strict=True):
    codes += (relative > (low + high) / 2).astype(jnp.uint8)
  half = size // 2
  packed = codes[..., :half, :] | (codes[..., half:, :] << 4)
  values = packed.reshape(
    *leading, inputs // 2, outputs, out_sharding=P(*first, split, last)
  )
  return jax.sharding.reshard(values, stored), scales


def _decode_nf4(values: jax.Array, scales: jax.Array) -> jax.Array:
  """Returns the weight in float32; its blocks are whole on each device."""
  *leading, half, outputs = values.shape
  blocks = scales.shape[-2]
  *first, split, last = _spec(values)
  packed = values.reshape(
    *leading, blocks, half // blocks, outputs,
    out_sharding=P(*first, split, None, last),
  ).astype(jnp.int32)  # fmt: skip
  codes = jnp.concatenate([packed & 15, packed >> 4], axis=-2)
  weight = _look_up(codes) * scales[..., None, :].astype(jnp.float32)
  return weight.reshape(
    *leading, 2 * half, outputs, out_sharding=P(*first, split, last)
  )


def _look_up(codes: jax.Array) -> jax.Array:
  """Returns the float32 value of each code.

  By a tree of choices, bit by bit: on a TPU a look-up in a table goes element
  by element, and choices are vector operations that fuse.
  """
  values = [jnp.float32(value) for value in NF4]
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    values = [
      jnp.where(is_set, high, low)
      for low, high in zip(values[::2], values[1::2], strict=True)
    ]
  return values[0]


def _spec(x: jax.Array) -> P:
  """Returns how each axis is split."""
  partitions = jax.typeof(x).sharding.spec
  return P(*partitions, *(None,) * (x.ndim - len(partitions)))
