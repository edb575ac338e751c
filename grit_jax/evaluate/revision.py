"""What tells one model's results from another's."""

import hashlib
import json

import jax
import jax.numpy as jnp

from grit_jax.inference.gritlm import GritLM


def find_revision(model: GritLM, **settings: int) -> str:
  """Returns 12 hexadecimal digits of all that a model's results depend on.

  They are the same on every mesh and machine: of the weights they take the sums
  of their bits, in integers, which no order of a sum changes.

  Args:
    model: The model.
    **settings: Those of the evaluation.
  """
  config = model.config.model
  parts = {
    'tokenizer': model.tokenizer.fingerprint,
    'attention': config.attention,
    'pooling': config.pooling,
    'dtype': config.dtype,
    **settings,
  }
  with jax.set_mesh(model.mesh):
    sums = jax.device_get(_sum_bits(model.model))
  for path, total in jax.tree_util.tree_leaves_with_path(sums):
    parts[jax.tree_util.keystr(path)] = int(total)
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


@jax.jit
def _sum_bits(model: object) -> object:
  """Returns the model with the sum of its bits in place of each array."""

  def add(x: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    return bits.astype(jnp.uint32).sum()

  return jax.tree.map(add, model)
