"""Tests of counting a program's operations."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grit_jax.aot.flops import count_flops

X, W = jnp.ones((4, 8)), jnp.ones((8, 8))
ONCE = 2 * 4 * 8 * 8  # of X @ W


def count(function, *arguments, shards: int = 1, trips: int = 1) -> float:
  return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr, shards, trips)


def test_a_product_is_two_operations_a_term():
  assert count(jnp.matmul, X, W) == ONCE
  batched = jnp.ones((3, 4, 8)), jnp.ones((3, 8, 5))
  assert count(jnp.matmul, *batched) == 2 * 3 * 4 * 8 * 5


def test_a_gradient_takes_two_forwards_and_remat_one_more():
  def loss(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sin(jnp.sin(x @ w) @ w).sum()

  gradient = jax.grad(loss, argnums=(0, 1))
  assert count(gradient, W, X) == 3 * 2 * ONCE
  again = jax.grad(jax.checkpoint(loss), argnums=(0, 1))
  assert count(again, W, X) == 4 * 2 * ONCE


def test_a_scan_counts_every_turn():
  def run(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, _: (x @ W, None), x, None, length=7)[0]

  assert count(run, X) == 7 * ONCE


def test_the_outermost_loop_of_unknown_length_takes_the_trips_given():
  def inner(turns: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, turns, lambda _, x: x @ W, x)

  def outer(turns: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, turns, lambda _, x: inner(turns, x), x)

  assert count(inner, 3, X, trips=5) == 5 * ONCE
  assert count(outer, 3, X, trips=5) == 5 * ONCE


def test_of_two_branches_the_longer_counts():
  def run(choice: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.cond(choice, lambda x: x @ W @ W, lambda x: x @ W, x)

  assert count(run, True, X) == 2 * ONCE


def test_a_shard_map_runs_on_all_shards(one_device: Mesh):
  run = jax.shard_map(
    lambda x: x @ W, in_specs=P(), out_specs=P(), check_vma=False
  )
  assert count(run, X, shards=6) == 6 * ONCE


def test_a_kernel_runs_once_a_place_of_its_grid():
  def kernel(x: jax.Array, w: jax.Array, out: jax.Array) -> None:
    out[...] = x[...] @ w[...]

  run = pl.pallas_call(
    kernel,
    grid=(2, 3),
    out_shape=jax.ShapeDtypeStruct((4, 8), 'float32'),
    interpret=True,
  )
  assert count(run, X, W) == 6 * ONCE


def test_a_grouped_product_counts_a_group_a_row():
  experts, sizes = jnp.ones((3, 8, 5)), jnp.array([1, 2, 1])
  assert count(jax.lax.ragged_dot, X, experts, sizes) == 2 * 4 * 8 * 5
