"""Tests of quantised weights, against numpy and the definition of the codes."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from grit_jax.batch import Rows
from grit_jax.config import MeshConfig, ModelConfig
from grit_jax.errors import UserError
from grit_jax.models import presets
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Decoder
from grit_jax.models.projections import find_part, projection_axes
from grit_jax.models.quantization import (
  NF4,
  QuantizedWeight,
  quantize,
  quantize_weight,
)
from grit_jax.sharding import make_mesh, place

# The paper's table is printed from float32.
CODE_TOLERANCE = 1e-6
# A product of float32 numbers, against float64.
DECODED_TOLERANCE = 1e-6
# Half the widest gap of the codes, and what bfloat16 does to a scale.
NF4_BOUND = (1 - 0.6961288) / 2 + 2**-8
INT8_BOUND = 0.5 / 127 + 1e-6
# Float32 sums in another order.
MESH_TOLERANCE = 1e-5

# Blocks of 64 that divide over `tensor`, and of 16 that do not over the rest.
DENSE = dataclasses.replace(
  presets.tiny(), embed_dim=48, head_dim=32, num_kv_heads=2, mlp_dim=128
)
EXPERTS = dataclasses.replace(DENSE, num_experts=4)
LOGICAL = ('layers', 'embed', 'mlp')


def draw(*shape: int) -> np.ndarray:
  """Weights whose channels and blocks differ in size, one channel of zeros."""
  rng = np.random.default_rng(0)
  sizes = np.exp(rng.normal(size=(*shape[:-2], shape[-2] // 16, shape[-1])))
  values = rng.normal(size=shape) * np.repeat(sizes, 16, axis=-2)
  values[..., 3] = 0
  return values.astype(np.float32)


def int8_in_numpy(weight: np.ndarray) -> np.ndarray:
  scale = np.abs(weight).max(axis=-2, keepdims=True) / 127
  return np.rint(weight / np.where(scale > 0, scale, 1)) * scale


def nf4_in_numpy(weight: np.ndarray, block: int) -> np.ndarray:
  """Every entry becomes the nearest of the block's 16 values, by search."""
  blocks = weight.reshape(*weight.shape[:-2], -1, block, weight.shape[-1])
  scales = np.abs(blocks).max(axis=-2, keepdims=True)
  scales = scales.astype(jnp.bfloat16).astype(np.float64)
  codes = np.array(NF4)
  values = scales[..., None] * codes
  nearest = np.abs(blocks[..., None] - values).argmin(axis=-1)
  return (codes[nearest] * scales).reshape(weight.shape)


def test_the_codes_are_the_quantiles_of_the_paper():
  offset = 0.9677083  # Appendix E of arXiv 2305.14314
  positive = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
  negative = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
  codes = np.sort([*positive, 0, *negative]) / positive.max()
  np.testing.assert_allclose(NF4, codes, atol=CODE_TOLERANCE)


def test_int8_is_that_of_numpy(one_device):
  weight = draw(2, 48, 12)
  quantized = quantize_weight(jnp.asarray(weight), LOGICAL, 'int8')
  assert quantized.values.dtype == jnp.int8
  decoded = np.asarray(quantized.decode('float32'))
  np.testing.assert_allclose(
    decoded,
    int8_in_numpy(weight.astype(np.float64)),
    rtol=DECODED_TOLERANCE,
    atol=1e-7,
  )
  largest = np.abs(weight).max(axis=-2, keepdims=True)
  assert (np.abs(decoded - weight) <= INT8_BOUND * largest).all()
  assert not decoded[..., 3].any()


@pytest.mark.parametrize(('inputs', 'block'), [(128, 64), (48, 16), (10, 2)])
def test_nf4_is_that_of_numpy(one_device, inputs: int, block: int):
  weight = draw(2, 128, 12)[:, :inputs]
  quantized = quantize_weight(jnp.asarray(weight), LOGICAL, 'nf4')
  assert quantized.values.dtype == jnp.uint8
  assert quantized.values.shape == (2, inputs // 2, 12)
  assert quantized.scales.shape == (2, inputs // block, 12)
  decoded = np.asarray(quantized.decode('float32'))
  expected = nf4_in_numpy(weight.astype(np.float64), block)
  np.testing.assert_allclose(decoded, expected, rtol=DECODED_TOLERANCE)
  blocks = weight.reshape(2, -1, block, 12)
  bound = NF4_BOUND * np.abs(blocks).max(axis=2, keepdims=True)
  assert (np.abs(decoded.reshape(blocks.shape) - blocks) <= bound).all()
  assert not decoded[..., 3].any()


def place_rows(mesh: jax.sharding.Mesh, pack: Callable) -> Rows:
  rows = pack(*['iitt|itt', 'ttttt|itt'] * 4, length=10)
  return jax.tree.map(lambda x: place(mesh, x, 'rows', 'seq'), rows)


@jax.jit
def run(model: Decoder, rows: Rows) -> jax.Array:
  return model([rows], [Kind.CAUSAL], remat='full')[0]


# Experts that stay on their devices, and those that tokens travel to.
@pytest.mark.parametrize(
  ('config', 'kind', 'sizes'),
  [
    (DENSE, 'int8', MeshConfig(1, 8, 1, 1)),
    (DENSE, 'nf4', MeshConfig(2, 2, 2, 1)),
    (EXPERTS, 'int8', MeshConfig(2, 2, 2, 1)),
    (EXPERTS, 'nf4', MeshConfig(1, 2, 1, 4)),
  ],
  ids=['dense-int8', 'dense-nf4', 'experts-int8', 'experts-nf4'],
)
def test_states_are_those_of_the_decoded_weights_on_a_mesh(
  config: ModelConfig,
  kind: str,
  sizes: MeshConfig,
  mesh_of: Callable,
  random_decoder: Callable,
  pack: Callable,
):
  mesh = make_mesh(sizes)
  with jax.set_mesh(mesh):
    model = quantize(random_decoder(mesh, config), kind)
    found = np.asarray(run(model, place_rows(mesh, pack)))
  mesh = mesh_of(1, 1, 1)
  with jax.set_mesh(mesh):
    plain = random_decoder(mesh, config)
    for path in projection_axes(config):
      part = find_part(plain, path)
      weight = np.asarray(part[...])
      decoded = (
        int8_in_numpy(weight)
        if kind == 'int8'
        else nf4_in_numpy(weight, min(64, weight.shape[-2] & -weight.shape[-2]))
      )
      part[...] = jax.device_put(decoded.astype('float32'), part[...].sharding)
    expected = np.asarray(run(plain, place_rows(mesh, pack)))
  np.testing.assert_allclose(
    found, expected, atol=MESH_TOLERANCE * np.abs(expected).max()
  )


def test_bytes_are_gathered_and_no_more_than_a_layer_is_decoded(
  mesh_of: Callable, random_decoder: Callable, pack: Callable
):
  mesh = mesh_of(1, 8, 1)
  with jax.set_mesh(mesh):
    model = quantize(random_decoder(mesh, DENSE), 'nf4')
    rows = place_rows(mesh, pack)
    program = run.lower(model, rows).compile().as_text()
  gathered = re.findall(r'= (\w+)\[([\d,]+)\]\S* all-gather\(', program)
  # Whatever there is of floats is the embedding table.
  assert {shape for dtype, shape in gathered if dtype != 'u8'} <= {
    '64,48', '256,48', '2,48', '1,48'
  }  # fmt: skip
  assert sum(dtype == 'u8' for dtype, _ in gathered) == 7
  # Of all layers there are bytes alone.
  assert 'u8[2,3,128]' in program
  assert not re.search(r'(f32|s32)\[2,(48,128|128,48)\]', program)


def test_a_quantised_weight_has_no_gradient(one_device):
  quantized = quantize_weight(jnp.asarray(draw(1, 64, 8)), LOGICAL, 'nf4')

  def total(x: jax.Array, scales: jax.Array) -> jax.Array:
    weight = QuantizedWeight(quantized.values[0], scales[0], 'nf4')
    return (x @ weight.decode('float32')).sum()

  of_x, of_scales = jax.grad(total, argnums=(0, 1))(
    jnp.ones((3, 64)), quantized.scales
  )
  assert np.asarray(of_x).any()
  assert not np.asarray(of_scales).any()


def test_what_is_not_a_projection_stays(one_device, random_decoder):
  model = random_decoder(one_device, EXPERTS)
  quantized = quantize(model, 'int8')
  assert quantized.embed[...] is model.embed[...]
  assert quantized.blocks.moe.router[...] is model.blocks.moe.router[...]
  assert isinstance(quantized.blocks.moe.gate, QuantizedWeight)
  # The model itself is as it was.
  assert isinstance(model.blocks.moe.gate[...], jax.Array)


def test_blocks_that_do_not_divide_are_an_error(mesh_of, random_decoder):
  mesh = mesh_of(1, 2, 4)
  config = dataclasses.replace(DENSE, num_kv_heads=4)
  with jax.set_mesh(mesh):
    model = random_decoder(mesh, config)
    quantize(model, 'int8')
    with pytest.raises(UserError, match=r'2 blocks of 64 inputs .* 4 devices'):
      quantize(model, 'nf4')


def test_an_unknown_kind_and_a_part_of_a_weight_are_errors(one_device):
  weight = jnp.ones((1, 64, 8))
  with pytest.raises(ValueError, match="'int4' is not one of int8, nf4"):
    quantize_weight(weight, LOGICAL, 'int4')
  with pytest.raises(TypeError, match='read whole'):
    quantize_weight(weight, LOGICAL, 'int8')[0]
