"""AdamW with its schedule, from optax."""

from typing import Any

import jax
import optax

from grit_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns the learning rate by step: a linear warm-up, then the schedule.

  Args:
    config: its `warmup_fraction` of `steps`, rounded up, warms up from 0.
    steps: of the run; linear and cosine end there at 0.
  """
  peak = config.learning_rate
  warmup = -int(-config.warmup_fraction * steps // 1)
  rest = max(steps - warmup, 1)  # a run of one step is all warm-up
  decay = {
    'linear': lambda: optax.linear_schedule(peak, 0.0, rest),
    'cosine': lambda: optax.cosine_decay_schedule(peak, rest),
    'constant': lambda: optax.constant_schedule(peak),
  }[config.schedule]()
  if not warmup:
    return decay
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup), decay], [warmup]
  )


def make_optimizer(
  config: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
  """Returns clipping by the global norm, then AdamW."""
  adamw = optax.adamw(
    make_schedule(config, steps),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    mu_dtype=config.first_moment_dtype,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )
  if not config.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decay_mask(params: Any) -> Any:
  """Returns a tree of True for matrices and False for norm scales and biases.

  Layers are stacked, so a layer's norm scale is [L, D]: the path decides.
  """

  def is_matrix(path: tuple, _: jax.Array) -> bool:
    names = [getattr(key, 'name', None) for key in path]
    return not any(
      name is not None and (name.endswith('norm') or name.endswith('bias'))
      for name in names
    )

  return jax.tree_util.tree_map_with_path(is_matrix, params)
