"""Tests of what each token sees, of the choice of kernel, of rotations."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from visibility import LETTERS, seen_by

from grit_jax.config import ATTENTION_MODES, RotaryScalingConfig
from grit_jax.errors import ConfigError
from grit_jax.models import attention
from grit_jax.models.attention import Kind

# Float32 cosines of angles up to 4096, whose spacing is 2^-11 = 5e-4.
ANGLE_TOLERANCE = 5e-4

LENGTH = 14
LAYOUTS = (
  'iitt|ii|iiitt',  # padding behind; instruction against instruction
  'iittiitttiitii',  # several stretches in a segment, a full row
  't|i|tt|tti|itti',
  '',
)


@pytest.mark.parametrize('window', [0, 1, 3])
@pytest.mark.parametrize('kind', Kind)
def test_stretches_equal_their_definition_token_by_token(
  pack: Callable, kind: Kind, window: int
):
  rows = pack(*LAYOUTS, length=LENGTH)
  first, last = attention.find_stretches(rows, kind, window)
  assert first.dtype == last.dtype == 'int32'
  index = np.arange(LENGTH)
  for row, t in np.ndindex(rows.segments.shape):
    seen = (first[row, t] <= index) & (index <= last[row, t])
    expected = seen_by(rows, row, t, kind, window)
    assert expected[t] == (rows.segments[row, t] > 0)
    assert seen.tolist() == expected.tolist(), (row, t)


@pytest.mark.parametrize('window', [0, 1, 3])
@pytest.mark.parametrize('kind', [Kind.INSTRUCTION, Kind.TEXT])
def test_last_seen_is_the_last_of_the_definition(
  pack: Callable, kind: Kind, window: int
):
  rows = pack(*LAYOUTS, length=LENGTH)
  last = np.asarray(attention.last_seen(rows, kind, window))
  for row, t in np.argwhere(rows.segments > 0):
    seen = seen_by(rows, row, t, kind, window)
    # Beyond the segment it need not say; segments part those.
    end = np.flatnonzero(rows.segments[row] == rows.segments[row, t])[-1]
    assert min(last[row, t], end) == np.flatnonzero(seen)[-1], (row, t)


@pytest.mark.parametrize(
  ('name', 'platform', 'kernel'),
  [
    ('auto', 'tpu', 'splash'),
    ('auto', 'gpu', 'xla'),
    ('auto', 'cpu', 'xla'),
    ('splash', 'tpu', 'splash'),
    ('splash', 'cpu', 'splash'),
    ('xla', 'tpu', 'xla'),
    ('xla', 'gpu', 'xla'),
  ],
)
def test_kernel_is_the_one_named_or_the_platforms(name, platform, kernel):
  assert attention.choose_kernel(name, platform) == kernel


def test_kernel_that_does_not_run_on_the_platform_raises():
  with pytest.raises(ConfigError, match="platform 'gpu'"):
    attention.choose_kernel('splash', 'gpu')


@pytest.mark.parametrize('mode', ATTENTION_MODES)
def test_modes_give_each_stream_its_two_letters(mode: str):
  assert LETTERS[attention.embedding_kind(mode)] == mode[:2]
  assert LETTERS[attention.generative_kind(mode)] == mode[2:]


def test_rotate_multiplies_complex_pairs_by_their_phase():
  rng = np.random.default_rng(0)
  head_dim, theta = 10, 1000.0
  x = rng.standard_normal((2, 5, 3, head_dim))
  positions = rng.integers(4096, size=(2, 5))
  phases = positions[..., None] * theta ** (-np.arange(5) / 5)
  pairs = x[..., :5] + 1j * x[..., 5:]
  turned = pairs * np.exp(1j * phases)[:, :, None]
  frequencies = attention.rotary_frequencies(
    head_dim, theta, RotaryScalingConfig()
  )
  angles = attention.rotary_angles(
    jax.numpy.asarray(positions, 'int32'), frequencies
  )
  actual = attention.rotate(jax.numpy.asarray(x, 'float32'), angles)
  np.testing.assert_allclose(
    actual,
    np.concatenate([turned.real, turned.imag], axis=-1),
    atol=ANGLE_TOLERANCE * np.abs(x).max(),
  )


def test_rotate_scales_before_it_rounds():
  rng = np.random.default_rng(0)
  x = jax.numpy.asarray(rng.standard_normal((2, 5, 3, 10)), 'bfloat16')
  positions = jax.numpy.asarray(rng.integers(4096, size=(2, 5)), 'int32')
  frequencies = attention.rotary_frequencies(10, 1e4, RotaryScalingConfig())
  angles = attention.rotary_angles(positions, frequencies)
  wide = attention.rotate(x.astype('float32'), angles)
  actual = attention.rotate(x, angles, scale=1 / 3)
  # Half a step of bfloat16's 8 bits; rounded before and after, it is up to
  # twice that.
  np.testing.assert_allclose(
    actual.astype('float32'), wide / 3, rtol=2**-8, atol=1e-6
  )


def test_rotary_angles_are_float32_for_bfloat16_heads():
  positions = jax.numpy.asarray([[256, 257]], 'int32')
  frequencies = attention.rotary_frequencies(4, 1e4, RotaryScalingConfig())
  cos, sin = attention.rotary_angles(positions, frequencies)
  assert cos.dtype == sin.dtype == 'float32'
  assert cos[0, 0, 0] != cos[0, 1, 0]
  x = jax.numpy.ones((1, 2, 1, 4), 'bfloat16')
  assert attention.rotate(x, (cos, sin)).dtype == 'bfloat16'


@pytest.mark.parametrize(
  'scaling',
  [
    RotaryScalingConfig(),
    RotaryScalingConfig('linear', factor=4.0),
    RotaryScalingConfig('llama3', 8.0, 1.0, 4.0, 8192),
    RotaryScalingConfig('llama3', 32.0, 2.0, 5.0, 100),
  ],
  ids=['none', 'linear', 'llama3', 'llama3-other'],
)
def test_rotary_frequencies_equal_transformers(scaling: RotaryScalingConfig):
  transformers = pytest.importorskip('transformers')
  utilities = pytest.importorskip('transformers.modeling_rope_utils')
  rope = {
    'rope_type': 'default' if scaling.kind == 'none' else scaling.kind,
    'rope_theta': 500000.0,
    'factor': scaling.factor,
    'low_freq_factor': scaling.low_frequency_factor,
    'high_freq_factor': scaling.high_frequency_factor,
    'original_max_position_embeddings': scaling.original_positions,
  }
  config = transformers.LlamaConfig(
    hidden_size=256, num_attention_heads=2, rope_parameters=rope
  )
  if scaling.kind == 'none':
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    expected = rotary(config).inv_freq
  else:
    expected, factor = utilities.ROPE_INIT_FUNCTIONS[scaling.kind](config)
    assert factor == 1.0
  actual = attention.rotary_frequencies(128, 500000.0, scaling)
  assert actual.dtype == 'float32'
  # Float32 powers of two libraries are a few units in the last place apart;
  # the blend subtracts numbers that are near to each other from them.
  np.testing.assert_allclose(actual, expected.numpy(), rtol=3e-6)
