"""Tests of the product of tokens and a weight."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grit_jax import sharding
from grit_jax.models.projections import multiply

ROWS, TOKENS, INPUTS, OUTPUTS = 4, 64, 24, 40


def loss(weight: jax.Array, x: jax.Array) -> jax.Array:
  """Of a product between things that are computed token by token."""
  return jnp.sin(multiply(jnp.cos(x), weight, 'embed', 'mlp')).sum()


def test_on_a_cpu_a_gradient_writes_no_tokens_transposed(one_device: Mesh):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((ROWS, TOKENS, INPUTS)).astype('float32')
  weight = rng.standard_normal((INPUTS, OUTPUTS)).astype('float32')
  placed = (
    sharding.place(one_device, weight, 'embed', 'mlp'),
    sharding.place(one_device, x, 'rows', 'seq', 'embed'),
  )
  program = jax.jit(jax.grad(loss)).lower(*placed).compile()
  text = program.as_text()
  assert f'f32[{ROWS * TOKENS},{OUTPUTS}]' in text
  for width in (INPUTS, OUTPUTS):
    assert f'f32[{width},{ROWS * TOKENS}]' not in text
  x, weight = x.astype('float64'), weight.astype('float64')
  expected = np.einsum('bti,bto->io', np.cos(x), np.cos(np.cos(x) @ weight))
  # Float32 sums of 256 products of numbers of size 1.
  np.testing.assert_allclose(program(*placed), expected, atol=1e-4)
