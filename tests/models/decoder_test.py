"""Tests of the decoder: against transformers, and of what it may see."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from visibility import seen_by

from grit_jax.batch import Rows
from grit_jax.config import ModelConfig
from grit_jax.models import presets
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import INIT_SCALE, Decoder, count_parameters

# Two float32 programs over two layers, logits of size 1 to 5.
LOGIT_TOLERANCE = 1e-4
# The same program on the same numbers, summed in another order or shape.
SAME_TOLERANCE = 1e-5
# The standard error of a standard deviation over 1e4 and more draws is 0.7%.
DRAW_TOLERANCE = 0.03

LENGTH = 14
LAYOUTS = ('iitt|ititt|iit', 'ittittt')
CONFIG = dataclasses.replace(presets.tiny(), rope_theta=100.0)


@pytest.fixture
def model(one_device: Mesh, random_decoder: Callable) -> Decoder:
  """A decoder of two layers on one device."""
  return random_decoder(one_device, CONFIG)


@functools.partial(jax.jit, static_argnames=('kind',))
def run(model: Decoder, rows: Rows, kind: Kind) -> jax.Array:
  """The hidden states of one stream."""
  return model([rows], [kind])[0]


@functools.partial(jax.jit, static_argnames=('kind',))
def score(model: Decoder, rows: Rows, kind: Kind) -> jax.Array:
  """The logits of one stream."""
  return model.logits(model([rows], [kind])[0], model.gather_head())


def make_torch_model(model: Decoder, is_causal: bool):
  """Copies our weights, stored [in, out], into transformers' Mistral."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = model.config
  window = config.sliding_window or None
  theirs = transformers.MistralForCausalLM(
    transformers.MistralConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.embed_dim,
      intermediate_size=config.mlp_dim,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      rms_norm_eps=config.norm_epsilon,
      rope_parameters={
        'rope_type': 'default', 'rope_theta': config.rope_theta
      },
      sliding_window=window,
      tie_word_embeddings=config.tie_embeddings,
      is_causal=is_causal,
      attn_implementation='eager',
    )
  )  # fmt: skip
  blocks, vocab = model.blocks, config.vocab_size
  weights = {
    'model.embed_tokens': model.embed[...][:vocab].T,
    'model.norm': model.final_norm[...],
    'lm_head': model.embed[...][:vocab].T,
  }
  if not config.tie_embeddings:
    weights['lm_head'] = model.head[...][:, :vocab]
  for i in range(config.num_layers):
    weights |= {
      f'model.layers.{i}.{name}': weight[...][i]
      for name, weight in {
        'self_attn.q_proj': blocks.attention.q,
        'self_attn.k_proj': blocks.attention.k,
        'self_attn.v_proj': blocks.attention.v,
        'self_attn.o_proj': blocks.attention.o,
        'mlp.gate_proj': blocks.mlp.gate,
        'mlp.up_proj': blocks.mlp.up,
        'mlp.down_proj': blocks.mlp.down,
        'input_layernorm': blocks.attention_norm,
        'post_attention_layernorm': blocks.mlp_norm,
      }.items()
    }
  theirs.load_state_dict(
    {f'{name}.weight': torch.tensor(np.array(weight).T)
     for name, weight in weights.items()}
  )  # fmt: skip
  return theirs.eval()


ONE_KV_HEAD = {
  'num_heads': 6,
  'num_kv_heads': 1,
  'head_dim': 6,
  'norm_epsilon': 0.1,
  'tie_embeddings': True,
}


@pytest.mark.parametrize(
  ('changes', 'kind'),
  [
    ({}, Kind.CAUSAL),
    ({}, Kind.BIDIRECTIONAL),
    (ONE_KV_HEAD, Kind.CAUSAL),
    ({'sliding_window': 3}, Kind.CAUSAL),
    ({'sliding_window': 3}, Kind.BIDIRECTIONAL),
  ],
  ids=[
    'causal', 'bidirectional', 'tied-one-kv-head', 'causal-window',
    'bidirectional-window',
  ],
)  # fmt: skip
def test_logits_equal_transformers_mistral(
  one_device: Mesh,
  random_decoder: Callable,
  pack: Callable,
  changes: dict,
  kind: Kind,
):
  torch = pytest.importorskip('torch')
  model = random_decoder(one_device, dataclasses.replace(CONFIG, **changes))
  theirs = make_torch_model(model, is_causal=kind is Kind.CAUSAL)
  rows = pack('t' * 11, 't' * 6, 't' * 12, length=12)
  real = rows.segments > 0
  with torch.no_grad():
    expected = theirs(
      input_ids=torch.tensor(rows.tokens).long(),
      attention_mask=torch.tensor(real).long(),
    ).logits.numpy()
  actual = np.asarray(score(model, rows, kind))[..., : CONFIG.vocab_size]
  assert np.abs(expected[real]).max() > 1
  np.testing.assert_allclose(
    actual[real], expected[real], atol=LOGIT_TOLERANCE, rtol=0
  )


@pytest.mark.parametrize('tied', [False, True])
def test_padded_vocabulary_has_no_probability(
  one_device: Mesh, random_decoder: Callable, tied: bool
):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  model = random_decoder(one_device, config)
  hidden = np.random.default_rng(0).standard_normal((2, 3, 32)) * 10

  @jax.jit
  def predict(model: Decoder, hidden: jax.Array) -> jax.Array:
    return jax.nn.softmax(model.logits(hidden, model.gather_head()))

  probabilities = np.asarray(predict(model, hidden.astype('float32')))
  assert probabilities.shape == (2, 3, 256)
  assert np.all(probabilities[..., 101:] == 0)
  np.testing.assert_allclose(
    probabilities[..., :101].sum(axis=-1), 1, atol=SAME_TOLERANCE
  )


@pytest.mark.parametrize('kind', Kind)
def test_packed_segments_equal_each_alone(
  model: Decoder, pack: Callable, kind: Kind
):
  rows = pack(*LAYOUTS, '', '', length=LENGTH)
  packed = np.asarray(run(model, rows, kind))
  alone = jax.tree.map(np.zeros_like, rows)
  places = []
  for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1)):
    place = np.s_[row, rows.segments[row] == segment]
    target = np.s_[len(places), : np.count_nonzero(place[1])]
    for field in ('tokens', 'positions', 'in_instruction'):
      getattr(alone, field)[target] = getattr(rows, field)[place]
    alone.segments[target] = 1
    places.append((place, target))
  separate = np.asarray(run(model, alone, kind))
  for place, target in places:
    np.testing.assert_allclose(
      packed[place], separate[target], atol=SAME_TOLERANCE
    )


@pytest.mark.parametrize('kind', Kind)
def test_one_segment_never_sees_another(
  model: Decoder, pack: Callable, kind: Kind
):
  rows = pack(*LAYOUTS, '', '', length=LENGTH)
  changed = rows.segments == 2
  tokens = np.where(changed, (rows.tokens + 1) % 101, rows.tokens)
  before = np.asarray(run(model, rows, kind))
  other = dataclasses.replace(rows, tokens=tokens)
  after = np.asarray(run(model, other, kind))
  np.testing.assert_array_equal(before[~changed], after[~changed])
  assert np.all(np.any(before[changed] != after[changed], axis=-1))


def test_future_tokens_do_not_change_causal_logits(
  model: Decoder, pack: Callable
):
  before, after = _change_from(model, pack, Kind.CAUSAL, 5)
  np.testing.assert_array_equal(before[:5], after[:5])
  assert np.all(np.any(before[5:] != after[5:], axis=-1))


def test_future_tokens_change_bidirectional_logits(
  model: Decoder, pack: Callable
):
  before, after = _change_from(model, pack, Kind.BIDIRECTIONAL, 5)
  assert np.all(np.any(before != after, axis=-1))


def _change_from(
  model: Decoder, pack: Callable, kind: Kind, start: int
) -> tuple[np.ndarray, np.ndarray]:
  # As many as transformers gets above: one program.
  rows = pack('t' * 12, '', '', length=12)
  tokens = rows.tokens.copy()
  tokens[0, start:] = (tokens[0, start:] + 1) % 101
  changed = dataclasses.replace(rows, tokens=tokens)
  before, after = (
    score(model, x, kind)[0, :, : CONFIG.vocab_size] for x in (rows, changed)
  )
  return np.asarray(before), np.asarray(after)


# The masks of all kinds with all windows: `attention_test`.
@pytest.mark.parametrize(
  ('kind', 'window'),
  [
    (Kind.CAUSAL, 2),
    (Kind.BIDIRECTIONAL, 0),
    (Kind.INSTRUCTION, 0),
    (Kind.TEXT, 2),
  ],
)
def test_gradients_flow_exactly_along_the_mask(
  one_device: Mesh,
  random_decoder: Callable,
  pack: Callable,
  kind: Kind,
  window: int,
):
  config = dataclasses.replace(CONFIG, sliding_window=window)
  model = random_decoder(one_device, config)
  rows = pack('itti|tittitt', length=12)
  # Each token once, so that a row of the table's gradient is a position's.
  tokens = np.random.default_rng(0).permutation(101)[None, :12]
  rows = dataclasses.replace(rows, tokens=tokens.astype(np.int32))
  weights = np.random.default_rng(1).standard_normal(CONFIG.embed_dim)
  weights = weights.astype(np.float32)[None, None]

  @jax.jit
  @jax.grad
  def derive(model: Decoder, t: jax.Array) -> jax.Array:
    (hidden,) = model([rows], [kind])
    at = jnp.arange(hidden.shape[1])[None, :, None] == t
    return (jnp.where(at, hidden, 0) * weights).sum()

  mask = np.stack([seen_by(rows, 0, t, kind, window) for t in range(12)])
  reachable = np.linalg.matrix_power(mask.astype(int), config.num_layers) > 0
  for t in range(11):
    gradient = np.asarray(derive(model, t).embed[...])
    seen = np.any(gradient[tokens[0]] != 0, axis=-1)
    np.testing.assert_array_equal(seen, reachable[t], err_msg=f'position {t}')


def test_joint_pass_equals_each_stream_alone(model: Decoder, pack: Callable):
  # Of several numbers of rows, and each alone in the four of `run` above.
  first = pack(*LAYOUTS, length=LENGTH, seed=1)
  second = pack('iittt|tt', 'tt|tt|it', 't', length=LENGTH, seed=2)
  kinds = (Kind.BIDIRECTIONAL, Kind.CAUSAL)
  joint = jax.jit(lambda model, streams: model(streams, kinds))
  states = joint(model, (first, second))
  for rows, kind, actual in zip((first, second), kinds, states, strict=True):
    assert actual.shape == (*rows.tokens.shape, CONFIG.embed_dim)
    count = len(rows.tokens)
    alone = jax.tree.map(lambda x: np.pad(x, ((0, 4 - len(x)), (0, 0))), rows)
    np.testing.assert_allclose(
      actual, run(model, alone, kind)[:count], atol=SAME_TOLERANCE
    )


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_without_remat_no_product_is_computed_twice(
  model: Decoder, pack: Callable, remat: str
):
  rows = pack(*LAYOUTS, length=LENGTH)

  def loss(model: Decoder) -> jax.Array:
    return model([rows], [Kind.CAUSAL], remat)[0].sum()

  program = str(jax.make_jaxpr(jax.grad(loss))(model))
  # The layers are one loop: its seven projections have two gradients each, and
  # the two products of attention have five for the backward pass.
  once = 3 * 7 + 2 + 5
  # The last projection of a layer is not needed again, as its result is not.
  again = {'none': 0, 'full': 6 + 2}[remat]
  assert program.count(' dot_general[') == once + again


def test_remat_changes_memory_and_not_the_gradient(
  model: Decoder, pack: Callable
):
  rows = pack(*LAYOUTS, length=LENGTH)

  def loss(model: Decoder, remat: str) -> jax.Array:
    (hidden,) = model([rows], [Kind.CAUSAL], remat)
    logits = model.logits(hidden, model.gather_head())
    return jnp.square(logits[..., : CONFIG.vocab_size]).sum()

  traced = {
    remat: jax.jit(
      jax.value_and_grad(functools.partial(loss, remat=remat))
    ).trace(model)
    for remat in ('none', 'full', 'offload')
  }
  compiled = {remat: x.lower().compile() for remat, x in traced.items()}
  expected_loss, expected = compiled['none'](model)
  for remat in ('full', 'offload'):
    actual_loss, actual = compiled[remat](model)
    np.testing.assert_allclose(actual_loss, expected_loss, rtol=SAME_TOLERANCE)
    jax.tree.map(_check_close, actual, expected)
  memory = {
    remat: program.memory_analysis().temp_size_in_bytes
    for remat, program in compiled.items()
  }
  assert memory['full'] < memory['none']
  # On a CPU all memory is the host's, so there is nothing to move.
  on_host = {
    remat: 'pinned_host' in x.lower(lowering_platforms=('tpu',)).as_text()
    for remat, x in traced.items()
  }
  assert on_host == {'none': False, 'full': False, 'offload': True}


def _check_close(actual: jax.Array, expected: jax.Array) -> None:
  scale = np.abs(expected).max()
  assert scale > 0
  np.testing.assert_allclose(actual, expected, atol=SAME_TOLERANCE * scale)


def test_layers_are_drawn_apart_and_at_the_initial_scale(one_device: Mesh):
  config = dataclasses.replace(presets.tiny(), embed_dim=64, mlp_dim=96)
  model = jax.jit(lambda: Decoder(config, jax.random.key(0)))()
  gate = np.asarray(model.blocks.mlp.gate[...])
  assert not np.any(gate[0] == gate[1])
  np.testing.assert_allclose(gate.std(), INIT_SCALE, rtol=DRAW_TOLERANCE)
  down = np.asarray(model.blocks.mlp.down[...])
  depth = np.sqrt(2 * config.num_layers)
  np.testing.assert_allclose(
    down.std() * depth, INIT_SCALE, rtol=DRAW_TOLERANCE
  )
  assert np.all(np.asarray(model.final_norm[...]) == 1)


@pytest.mark.parametrize(
  'changes',
  [{}, {'tie_embeddings': True}, {'projection_dim': 12}],
  ids=['untied', 'tied', 'projection'],
)
def test_count_parameters_equals_the_weights_without_padding(
  one_device: Mesh, changes: dict
):
  config = dataclasses.replace(presets.tiny(), vocab_size=256, **changes)
  assert _count_weights(config) == count_parameters(config)
  padded = dataclasses.replace(config, vocab_size=101)
  tables = 1 if config.tie_embeddings else 2
  padding = (256 - 101) * config.embed_dim * tables
  assert _count_weights(padded) == count_parameters(padded) + padding


def _count_weights(config: ModelConfig) -> int:
  shapes = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_activations_are_bfloat16_and_logits_float32(
  one_device: Mesh, random_decoder: Callable, pack: Callable
):
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  model = random_decoder(one_device, config)
  rows = pack(*LAYOUTS, length=LENGTH)
  hidden = jax.eval_shape(lambda: model([rows], [Kind.CAUSAL])[0])
  head = model.gather_head()
  assert hidden.dtype == head.dtype == 'bfloat16'
  states = np.random.default_rng(0).standard_normal(hidden.shape)
  states = jnp.asarray(states, 'bfloat16')
  expected = np.asarray(states, np.float64) @ np.asarray(head, np.float64)
  # A logit rounded to bfloat16 on its way would be off by 2^-9 of itself.
  np.testing.assert_allclose(
    model.logits(states, head)[..., :101],
    expected[..., :101],
    atol=SAME_TOLERANCE,
  )
