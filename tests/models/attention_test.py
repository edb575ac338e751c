"""Tests of the masks, of attention itself and of rotary positions."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from grit_jax.batch import Rows
from grit_jax.config import ATTENTION_MODES, ConfigError, RotaryScalingConfig
from grit_jax.models import attention
from grit_jax.models.attention import Kind
from grit_jax.sharding import place

# Float32 sums of some ten products of numbers of size 1, in another order.
SUM_TOLERANCE = 1e-5
# Float32 cosines of angles up to 4096, whose spacing is 2^-11 = 5e-4.
ANGLE_TOLERANCE = 5e-4

LENGTH = 14
LAYOUTS = (
  'iitt|ii|iiitt',  # padding behind; instruction against instruction
  'iittiitttiitii',  # several stretches in a segment, a full row
  't|i|tt|tti|itti',
  '',
)
KINDS = {
  'bb': Kind.BIDIRECTIONAL,
  'cc': Kind.CAUSAL,
  'bc': Kind.INSTRUCTION,
  'cb': Kind.TEXT,
}


def sees(rows: Rows, row: int, t: int, s: int, letters: str, window: int):
  """Whether token t sees token s by a mode's letters, one pair at a time."""
  segments, instruction = rows.segments[row], rows.in_instruction[row]
  if segments[t] != segments[s]:
    return False
  if window and abs(t - s) >= window + (letters == 'bb'):
    return False
  if s <= t or letters == 'bb':
    return True
  stretch = instruction[t : s + 1]
  letter = letters[0] if instruction[t] else letters[1]
  return letter == 'b' and bool(np.all(stretch == instruction[t]))


@pytest.mark.parametrize('window', [0, 1, 3])
@pytest.mark.parametrize('letters', KINDS)
def test_mask_equals_its_definition_token_by_token(
  pack: Callable, letters: str, window: int
):
  rows = pack(*LAYOUTS, length=LENGTH)
  mask = attention.make_mask(rows, KINDS[letters], window)
  assert mask.shape == (len(LAYOUTS), LENGTH, LENGTH)
  for row, t in np.argwhere(rows.segments > 0):
    expected = [sees(rows, row, t, s, letters, window) for s in range(LENGTH)]
    assert mask[row, t].tolist() == expected, (row, t)


@pytest.mark.parametrize('kind', Kind)
def test_padding_sees_itself_and_no_text(pack: Callable, kind: Kind):
  rows = pack(*LAYOUTS, length=LENGTH)
  mask = np.asarray(attention.make_mask(rows, kind, 0))
  padding = rows.segments == 0
  assert padding.any()
  assert not (mask & padding[:, :, None] & ~padding[:, None, :]).any()
  # A row of the softmax with nothing to see would be a mean of everything.
  assert mask.diagonal(axis1=1, axis2=2).all()


@pytest.mark.parametrize('window', [0, 1, 3])
@pytest.mark.parametrize('letters', ['bc', 'cb'])
def test_last_seen_is_the_last_of_the_definition(
  pack: Callable, letters: str, window: int
):
  rows = pack(*LAYOUTS, length=LENGTH)
  last = np.asarray(attention.last_seen(rows, KINDS[letters], window))
  for row, t in np.argwhere(rows.segments > 0):
    seen = [sees(rows, row, t, s, letters, window) for s in range(LENGTH)]
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
  assert attention.embedding_kind(mode) is KINDS[mode[:2]]
  assert attention.generative_kind(mode) is KINDS[mode[2:]]


def test_attend_equals_float64_attention_head_by_head(one_device: Mesh):
  rng = np.random.default_rng(0)
  rows, tokens, heads, kv_heads, head_dim = 2, 7, 6, 2, 4
  q = rng.standard_normal((rows, tokens, heads, head_dim))
  k, v = rng.standard_normal((2, rows, tokens, kv_heads, head_dim))
  mask = rng.random((rows, tokens, tokens)) < 0.5
  mask |= np.eye(tokens, dtype=bool)
  expected = np.empty_like(q)
  for n in range(heads):
    shared = n // (heads // kv_heads)
    scores = np.einsum('btd,bsd->bts', q[:, :, n], k[:, :, shared])
    weights = np.where(mask, np.exp(scores / np.sqrt(head_dim)), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected[:, :, n] = weights @ v[:, :, shared]
  arrays = [
    place(one_device, x.astype('float32'), 'rows', 'seq', axis, 'head_dim')
    for x, axis in (
      (q / np.sqrt(head_dim), 'heads'),
      (k, 'kv_heads'),
      (v, 'kv_heads'),
    )
  ]
  actual = attention.attend(*arrays, jax.numpy.asarray(mask))
  np.testing.assert_allclose(actual, expected, atol=SUM_TOLERANCE)


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
