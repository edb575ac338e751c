"""Tests of the schedule and of AdamW."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from grit_jax.config import OptimizerConfig
from grit_jax.models import presets
from grit_jax.models.decoder import Decoder
from grit_jax.optimizer import decay_mask, make_optimizer, make_schedule

# Float32 arithmetic of a few operations a number.
TOLERANCE = 1e-6
# Three float32 steps: square roots and divisions of sums of squares.
STEP_TOLERANCE = 1e-5

PEAK = 3e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """A matrix and a norm's scale, by paths like a decoder's."""

  gate: jax.Array
  norm: jax.Array


@pytest.mark.parametrize(
  ('schedule', 'middle', 'end'),
  [('linear', 0.5, 0.0), ('cosine', 0.5, 0.0), ('constant', 1.0, 1.0)],
)
def test_schedule_climbs_from_zero_to_the_peak_and_then_falls(
  schedule: str, middle: float, end: float
):
  config = OptimizerConfig(
    learning_rate=PEAK, schedule=schedule, warmup_fraction=0.1
  )
  rate = make_schedule(config, 100)
  actual = [float(rate(step)) / PEAK for step in (0, 5, 10, 55, 100)]
  expected = [0.0, 0.5, 1.0, middle, end]
  np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


def test_cosine_is_a_cosine():
  config = OptimizerConfig(
    learning_rate=PEAK, schedule='cosine', warmup_fraction=0.0
  )
  actual = float(make_schedule(config, 100)(25)) / PEAK
  np.testing.assert_allclose(
    actual, 0.5 * (1 + math.cos(math.pi / 4)), atol=TOLERANCE
  )


@pytest.mark.parametrize('schedule', ['linear', 'cosine', 'constant'])
def test_without_warm_up_the_first_step_has_the_peak(schedule: str):
  config = OptimizerConfig(
    learning_rate=PEAK, schedule=schedule, warmup_fraction=0.0
  )
  np.testing.assert_allclose(make_schedule(config, 7)(0), PEAK, rtol=TOLERANCE)


@pytest.mark.parametrize(
  ('steps', 'fraction', 'warmup'),
  # The recipe: 37.59 steps of warm-up are 38, as in the reference's Trainer.
  [(1253, 0.03, 38), (100, 0.03, 3), (10, 0.01, 1)],
)
def test_warm_up_is_rounded_up(steps: int, fraction: float, warmup: int):
  config = OptimizerConfig(learning_rate=PEAK, warmup_fraction=fraction)
  rate = make_schedule(config, steps)
  rates = [float(rate(step)) for step in range(steps + 1)]
  assert int(np.argmax(rates)) == warmup
  np.testing.assert_allclose(rates[warmup], PEAK, rtol=TOLERANCE)
  np.testing.assert_allclose(
    rates[warmup - 1], PEAK * (warmup - 1) / warmup, rtol=TOLERANCE
  )
  assert rates[0] == rates[-1] == 0


@pytest.mark.parametrize('schedule', ['linear', 'cosine', 'constant'])
def test_a_run_of_one_step_has_a_schedule(schedule: str):
  config = OptimizerConfig(schedule=schedule, warmup_fraction=0.03)
  assert make_schedule(config, 1)(0) == 0


def _wide(values: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  return {key: jnp.asarray(x, 'float32') for key, x in values.items()}


@pytest.mark.parametrize('clip_norm', [0.0, 0.5])
def test_steps_equal_adamw_in_float64(clip_norm: float):
  config = OptimizerConfig(
    learning_rate=PEAK,
    schedule='constant',
    warmup_fraction=0.0,
    beta1=0.8,
    beta2=0.95,
    epsilon=1e-3,
    weight_decay=0.1,
    clip_norm=clip_norm,
  )
  rng = np.random.default_rng(0)
  values = {'gate': rng.standard_normal((3, 4)), 'norm': np.ones(4)}
  params = Weights(**_wide(values))
  decay = {'gate': 0.1, 'norm': 0.0}
  optimizer = make_optimizer(config, steps=10)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  first = dict.fromkeys(values, 0.0)
  second = dict.fromkeys(values, 0.0)
  for step in range(1, 4):
    gradients = {key: rng.standard_normal(x.shape) for key, x in values.items()}
    updates, state = update(Weights(**_wide(gradients)), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    length = math.sqrt(sum((x**2).sum() for x in gradients.values()))
    clip = min(1.0, clip_norm / length) if clip_norm else 1.0
    for key, gradient in gradients.items():
      gradient = gradient * clip
      first[key] = 0.8 * first[key] + 0.2 * gradient
      second[key] = 0.95 * second[key] + 0.05 * gradient**2
      mean = first[key] / (1 - 0.8**step)
      square = second[key] / (1 - 0.95**step)
      values[key] = values[key] - PEAK * (
        mean / (np.sqrt(square) + 1e-3) + decay[key] * values[key]
      )
  for key, expected in values.items():
    np.testing.assert_allclose(
      getattr(params, key), expected, rtol=STEP_TOLERANCE, atol=TOLERANCE
    )


def test_decay_leaves_norm_scales_and_biases_alone(
  one_device: Mesh, random_decoder: Callable
):
  config = dataclasses.replace(presets.tiny(), projection_dim=4)
  model = random_decoder(one_device, config)
  mask = decay_mask(model)
  apart = (
    mask.blocks.attention_norm,
    mask.blocks.mlp_norm,
    mask.final_norm,
    mask.projection_bias,
  )
  assert not any(jax.tree.leaves(apart))
  matrices = (
    mask.embed, mask.head, mask.projection, mask.blocks.attention,
    mask.blocks.mlp,
  )  # fmt: skip
  assert all(jax.tree.leaves(matrices))
  assert len(jax.tree.leaves((apart, matrices))) == len(jax.tree.leaves(model))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_first_moment_has_its_dtype_and_the_second_stays_float32(
  one_device: Mesh, dtype: str
):
  config = OptimizerConfig(first_moment_dtype=dtype)
  optimizer = make_optimizer(config, steps=10)

  def start() -> tuple:
    model = Decoder(presets.tiny(), jax.random.key(0))
    state = optimizer.init(model)
    return state, optimizer.update(model, state, model)[1]

  for state in jax.eval_shape(start):
    (moments,) = optax.tree.get_all_with_path(state, 'mu')
    assert {leaf.dtype for leaf in jax.tree.leaves(moments[1])} == {
      jnp.dtype(dtype)
    }
    (squares,) = optax.tree.get_all_with_path(state, 'nu')
    assert {leaf.dtype for leaf in jax.tree.leaves(squares[1])} == {
      jnp.dtype('float32')
    }


def test_moments_are_sharded_as_their_weights(
  mesh_of: Callable, random_decoder: Callable
):
  mesh = mesh_of(1, 8, 1)
  config = dataclasses.replace(presets.tiny(), head_dim=12)
  model = random_decoder(mesh, config)
  optimizer = make_optimizer(OptimizerConfig(), steps=10)
  with jax.set_mesh(mesh):
    state = jax.jit(optimizer.init)(model)
  for name in ('mu', 'nu'):
    moment = optax.tree.get(state, name)
    jax.tree.map(_check_sharding, moment, model)


def _check_sharding(moment: jax.Array, weight: jax.Array) -> None:
  assert moment.sharding.is_equivalent_to(weight.sharding, weight.ndim)
