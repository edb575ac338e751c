"""Tests of the table of XLA's options."""

import jax
import jax.numpy as jnp

from grit_jax import xla_options
from grit_jax.config import MeshConfig
from grit_jax.sharding import make_mesh


def test_a_device_that_is_not_in_the_table_has_none():
  assert xla_options.compiler_options('another') == {}


def test_products_are_not_ynnpacks_and_what_is_compiled_once_stays():
  def multiply(x):
    return x @ x

  x = jnp.ones((256, 256))
  kind = jax.devices()[0].device_kind
  options = xla_options.compiler_options(kind)
  by_default = jax.jit(multiply).lower(x).compile().as_text()
  compiled = jax.jit(multiply, compiler_options=options).lower(x).compile()
  assert '__ynn_fusion' in by_default
  assert '__ynn_fusion' not in compiled.as_text()

  jitted = xla_options.jit(multiply)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    for _ in range(2):
      assert jitted(x)[0, 0] == 256
  on_cpu = jitted.of_kind(kind)
  assert on_cpu._cache_size() == 1
  assert '__ynn_fusion' not in on_cpu.lower(x).compile().as_text()
