"""How weights are drawn, each in the sharding it is stored in."""

import jax
import jax.numpy as jnp
from flax import nnx

from grit_jax.config import ModelConfig
from grit_jax.sharding import weight_spec

INIT_SCALE = 0.02  # Mistral's initializer_range


def draw_weight(
  key: jax.Array,
  shape: tuple[int, ...],
  logical: tuple[str, ...],
  config: ModelConfig,
  scale: float = INIT_SCALE,
) -> nnx.Param:
  """Draws a weight from a normal distribution of standard deviation `scale`.

  Args:
    key: The random key.
    shape: One length a logical axis.
    logical: The axes' names in `sharding.RULES`.
    config: Says in which dtype.
    scale: The standard deviation.
  """
  values = jax.random.normal(
    key, shape, config.param_dtype, out_sharding=weight_spec(*logical)
  )
  return nnx.Param(values * jnp.asarray(scale, config.param_dtype))


def output_scale(config: ModelConfig) -> float:
  """Returns the scale of what is added to the residual sum, 2L times."""
  return INIT_SCALE * (2 * config.num_layers) ** -0.5
