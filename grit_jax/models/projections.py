"""The projections of a layer: the matrices that are quantised and adapted."""

from typing import Any

import jax
import jax.numpy as jnp

from grit_jax.config import ModelConfig
from grit_jax.sharding import spec

# The logical axes of each, from its input to its output.
AXES = {
  'q': ('embed', 'heads'),
  'k': ('embed', 'kv_heads'),
  'v': ('embed', 'kv_heads'),
  'o': ('heads', 'embed'),
  'gate': ('embed', 'mlp'),
  'up': ('embed', 'mlp'),
  'down': ('mlp', 'embed'),
}
ATTENTION = ('q', 'k', 'v', 'o')


def projection_axes(model: ModelConfig) -> dict[str, tuple[str, ...]]:
  """Returns the axes of all projections as a decoder has them, by path.

  The paths are as `blocks/attention/q`; layers are stacked on the first axis,
  and experts on the second.
  """
  part, experts = ('moe', ('experts',)) if model.num_experts else ('mlp', ())
  axes = {}
  for name, own in AXES.items():
    if name in ATTENTION:
      axes[f'blocks/attention/{name}'] = ('layers', *own)
    else:
      axes[f'blocks/{part}/{name}'] = ('layers', *experts, *own)
  return axes


def axis_sizes(model: ModelConfig) -> dict[str, int]:
  """Returns the size of each logical axis of a projection."""
  return {
    'layers': model.num_layers,
    'experts': model.num_experts,
    'embed': model.embed_dim,
    'heads': model.num_heads * model.head_dim,
    'kv_heads': model.num_kv_heads * model.head_dim,
    'mlp': model.mlp_dim,
  }


def multiply(
  x: jax.Array,
  weight: jax.Array,
  inputs: str,
  outputs: str,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Multiplies all tokens by a gathered weight, as one list of them.

  The weight's gradient sums over tokens. Over the two axes of rows XLA on a CPU
  first writes both factors transposed, and computes what they are made of once
  more for that, column by column: more than twice the time of a gradient.

  Args:
    x: [B, T, I].
    weight: [I, O].
    inputs: the logical axis of I.
    outputs: that of O.
    dtype: of sums and result; by default the factors'.

  Returns:
    [B, T, O].
  """
  tokens = x.reshape(-1, x.shape[-1], out_sharding=spec('rows', inputs))
  y = jnp.einsum(
    'ti,io->to', tokens, weight,
    preferred_element_type=dtype, out_sharding=spec('rows', outputs),
  )  # fmt: skip
  sharding = spec('rows', 'seq', outputs)
  return y.reshape(*x.shape[:2], -1, out_sharding=sharding)


def find_part(model: Any, path: str) -> Any:
  """Returns the module or weight of a decoder with a path."""
  for name in path.split('/'):
    model = model[int(name)] if name.isdigit() else getattr(model, name)
  return model
