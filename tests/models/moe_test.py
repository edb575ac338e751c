"""Tests of the mixture of experts, by itself and in the decoder."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from grit_jax import losses, sharding
from grit_jax.batch import Rows
from grit_jax.config import MeshConfig, ModelConfig
from grit_jax.models import moe, presets
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Decoder
from grit_jax.models.moe import MoE, RouterStatistics

CONFIG = presets.tiny_moe()
# Float32 sums of products of size 1 in another order; relative to the largest.
SUM_TOLERANCE = 1e-5
# Two float32 layers and a head against another implementation's.
LOGIT_TOLERANCE = 1e-4
# Float32 means of probabilities, each computed to 1e-7.
ROUTER_LOSS_TOLERANCE = 1e-6

# data, fsdp, tensor, expert: experts that stay, on all axes; one a device; and
# several, with their weights split in two steps or over `tensor`.
MESHES = [
  (1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 1, 8), (1, 4, 1, 2), (1, 2, 2, 2)
]  # fmt: skip


def mesh_with(sizes: tuple[int, int, int, int]) -> Mesh:
  devices = jax.devices()[: int(np.prod(sizes))]
  return sharding.make_mesh(MeshConfig(*sizes), devices)


def draw(bias: np.ndarray | None = None) -> dict[str, np.ndarray]:
  """Weights of a layer; a bias of experts is a first input that is always 1."""
  rng = np.random.default_rng(0)
  dim, mlp, experts = CONFIG.embed_dim, CONFIG.mlp_dim, CONFIG.num_experts
  weights = {
    'router': rng.standard_normal((dim, experts)),
    'gate': 0.3 * rng.standard_normal((experts, dim, mlp)),
    'up': 0.3 * rng.standard_normal((experts, dim, mlp)),
    'down': 0.3 * rng.standard_normal((experts, mlp, dim)),
  }
  if bias is not None:
    # Small beside the bias, whose softmax still has a gradient to compare.
    weights['router'] *= 0.1
    weights['router'][0] = bias
  return {name: weight.astype('float32') for name, weight in weights.items()}


X = np.random.default_rng(1).standard_normal((8, 5, CONFIG.embed_dim))
X[:, :, 0] = 1
COTANGENT = np.random.default_rng(2).standard_normal(X.shape)
COUNTED = np.random.default_rng(3).random((8, 5, 2)) < 0.7

BIASES = {
  'spread': None,
  # All tokens choose expert 5 first, and one of the others.
  'one-expert': np.eye(8)[5] * 4,
  # Nobody chooses the first four: on two devices one gets every token.
  'half-unused': np.array([-100.0] * 4 + [0.0] * 4),
}


@jax.jit
def apply_in_float64(weights: dict[str, np.ndarray], x: np.ndarray):
  """The dense definition: a loop over the experts, for all tokens."""
  tokens = x.reshape(-1, x.shape[-1])
  logits = tokens @ weights['router']
  best, chosen = jax.lax.top_k(logits, CONFIG.experts_per_token)
  share = jax.nn.softmax(best, axis=-1)
  out = jnp.zeros_like(tokens)
  for expert in range(CONFIG.num_experts):
    hidden = jax.nn.silu(tokens @ weights['gate'][expert])
    hidden = hidden * (tokens @ weights['up'][expert])
    weight = jnp.where(chosen == expert, share, 0).sum(axis=1)
    out += weight[:, None] * (hidden @ weights['down'][expert])
  return out.reshape(x.shape)


@jax.jit
def differentiate_in_float64(weights, x, cotangent) -> tuple:
  """Its output and gradients."""
  out, pull_back = jax.vjp(apply_in_float64, weights, x)
  return out, pull_back(cotangent)


@pytest.fixture(scope='module')
def expected() -> Callable[[str], tuple]:
  """Output and gradients of the dense loop in float64, once a bias."""
  kept = {}

  def get(name: str) -> tuple:
    if name not in kept:
      with jax.enable_x64(True):
        weights = {
          key: jnp.asarray(value, 'float64')
          for key, value in draw(BIASES[name]).items()
        }
        kept[name] = jax.tree.map(
          np.asarray, differentiate_in_float64(weights, X, COTANGENT)
        )
    return kept[name]

  return get


@jax.jit
def differentiate(
  layer: MoE, x: jax.Array, cotangent: jax.Array, counted: jax.Array
) -> tuple:
  """Output, statistics and gradients of our layer."""
  out, pull_back, statistics = jax.vjp(
    lambda layer, x: layer(x, counted), layer, x, has_aux=True
  )
  of_layer, of_x = pull_back(cotangent)
  of_weights = {name: getattr(of_layer, name)[...] for name in moe.LOGICAL}
  return out, statistics, of_weights, of_x


def run_layer(mesh: Mesh, weights: dict[str, np.ndarray]) -> tuple:
  """Those of a layer with these weights, in numpy."""
  with jax.set_mesh(mesh):
    layer = jax.eval_shape(lambda: MoE(CONFIG, jax.random.key(0)))
    for name, weight in weights.items():
      spec = sharding.weight_spec(*moe.LOGICAL[name])
      stored = jax.sharding.NamedSharding(mesh, spec)
      setattr(layer, name, nnx.Param(jax.device_put(weight, stored)))
    axes = ('rows', 'seq', 'embed')
    x, cotangent = (
      sharding.place(mesh, value.astype('float32'), *axes)
      for value in (X, COTANGENT)
    )
    counted = sharding.place(mesh, COUNTED, 'rows', 'seq', None)

    results = differentiate(layer, x, cotangent, counted)
    return jax.tree.map(np.asarray, results)


@pytest.mark.parametrize('bias', BIASES)
@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_layer_and_its_gradient_equal_the_dense_loop_on_every_mesh(
  expected: Callable, sizes: tuple, bias: str
):
  out, statistics, of_weights, of_x = run_layer(
    mesh_with(sizes), draw(BIASES[bias])
  )
  wanted, (wanted_weights, wanted_x) = expected(bias)
  for found, value in (
    (out, wanted),
    (of_x, wanted_x),
    *((of_weights[name], wanted_weights[name]) for name in of_weights),
  ):
    np.testing.assert_allclose(
      found, value, atol=SUM_TOLERANCE * np.abs(value).max()
    )
  unused = np.flatnonzero(statistics.chosen.sum(axis=0) == 0)
  if bias == 'half-unused':
    assert set(unused) >= {0, 1, 2, 3}
    assert not of_weights['down'][:4].any()
  if bias == 'one-expert':
    assert statistics.chosen[0, 5] == statistics.tokens[0]


def count_products(sizes: tuple[int, int, int, int]) -> float:
  """A device's products in a forward pass, over those that tokens need."""
  mesh = mesh_with(sizes)

  def abstract(shape: tuple, dtype: str, spec: jax.P) -> jax.ShapeDtypeStruct:
    stored = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=stored)

  with jax.set_mesh(mesh):
    layer = jax.tree.map(
      lambda x: abstract(x.shape, x.dtype, x.sharding.spec),
      jax.eval_shape(lambda: MoE(CONFIG, jax.random.key(0))),
    )
    rows, tokens = sharding.spec('rows', 'seq', None), 256
    x = abstract((8, tokens, CONFIG.embed_dim), 'float32', rows)
    counted = abstract((8, tokens, 1), 'bool', rows)
    run = jax.jit(lambda layer, x, counted: layer(x, counted)[0])
    cost = run.lower(layer, x, counted).compile().cost_analysis()
  product = 2 * CONFIG.embed_dim * CONFIG.mlp_dim
  return cost['flops'] / (
    3 * product * tokens * CONFIG.experts_per_token * 8 / mesh.size
  )


def test_a_dense_ragged_product_costs_little_where_a_device_has_one_expert():
  """As on GPU, `ragged_dot` on CPU multiplies by all experts of a device."""
  assert count_products((1, 8, 1, 1)) > CONFIG.num_experts
  # The slack of a round, and what is no product.
  assert count_products((1, 1, 1, 8)) < 1.6 * moe.ROUND_SLACK


def test_statistics_are_those_of_the_counted_tokens_on_every_mesh():
  weights = draw()
  tokens = X.reshape(-1, X.shape[-1])
  logits = tokens @ weights['router'].astype('float64')
  probability = np.exp(logits)
  normaliser = probability.sum(axis=1)
  probability /= normaliser[:, None]
  chosen = np.argsort(-logits, axis=1)[:, : CONFIG.experts_per_token]
  for sizes in ((1, 1, 1, 1), (1, 2, 2, 2)):
    _, statistics, _, _ = run_layer(mesh_with(sizes), weights)
    for stream in range(2):
      counted = COUNTED[:, :, stream].reshape(-1)
      assert statistics.tokens[stream] == counted.sum()
      np.testing.assert_array_equal(
        statistics.chosen[stream],
        np.bincount(chosen[counted].reshape(-1), minlength=8),
      )
      for found, value in (
        (statistics.probability, probability[counted].sum(axis=0)),
        (
          statistics.entropy,
          -(probability * np.log(probability))[counted].sum(),
        ),
        (
          statistics.squared_normaliser,
          (np.log(normaliser) ** 2)[counted].sum(),
        ),
      ):
        np.testing.assert_allclose(found[stream], value, rtol=SUM_TOLERANCE)


@pytest.mark.parametrize('masked', [False, True])
def test_load_balancing_loss_equals_transformers(masked: bool):
  torch = pytest.importorskip('torch')
  mixtral = pytest.importorskip('transformers.models.mixtral.modeling_mixtral')
  rng = np.random.default_rng(0)
  layers, rows, tokens, experts = 3, 4, 7, 8
  logits = rng.standard_normal((layers, rows * tokens, experts)) * 2
  logits = logits.astype('float32')
  mask = rng.random((rows, tokens)) < (0.6 if masked else 2)
  expected = mixtral.load_balancing_loss_func(
    tuple(map(torch.tensor, logits)),
    experts,
    2,
    torch.tensor(mask.astype('int64')) if masked else None,
  )
  count = jax.jit(moe.router_statistics)
  chosen = np.argsort(-logits, axis=-1)[..., :2].astype('int32')
  statistics = [
    count(*layer, mask.reshape(-1, 1))
    for layer in zip(logits, chosen, strict=True)
  ]
  stacked = jax.tree.map(lambda *x: np.stack(x), *statistics)
  assert isinstance(stacked, RouterStatistics)
  found = jax.jit(losses.load_balancing_loss)(stacked)[0]
  np.testing.assert_allclose(
    found, expected.numpy(), rtol=ROUTER_LOSS_TOLERANCE
  )


def transformers_mixtral(model: Decoder, config: ModelConfig):
  """Copies our weights into transformers' Mixtral."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  theirs = transformers.MixtralForCausalLM(
    transformers.MixtralConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.embed_dim,
      intermediate_size=config.mlp_dim,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      num_local_experts=config.num_experts,
      num_experts_per_tok=config.experts_per_token,
      rms_norm_eps=config.norm_epsilon,
      rope_parameters={
        'rope_type': 'default', 'rope_theta': config.rope_theta
      },
      tie_word_embeddings=False,
      attn_implementation='eager',
      output_router_logits=True,
    )
  ).eval()  # fmt: skip

  def torch_of(x: jax.Array):
    return torch.tensor(np.asarray(x))

  state = {
    'model.embed_tokens.weight': torch_of(
      model.embed[...][: config.vocab_size]
    ),
    'model.norm.weight': torch_of(model.final_norm[...]),
    'lm_head.weight': torch_of(model.head[...].T[: config.vocab_size]),
  }
  blocks = model.blocks
  for i in range(config.num_layers):
    prefix = f'model.layers.{i}.'
    for name, weight in {
      'input_layernorm': blocks.attention_norm,
      'post_attention_layernorm': blocks.mlp_norm,
      'self_attn.q_proj': blocks.attention.q,
      'self_attn.k_proj': blocks.attention.k,
      'self_attn.v_proj': blocks.attention.v,
      'self_attn.o_proj': blocks.attention.o,
      'mlp.gate': blocks.moe.router,
    }.items():
      state[f'{prefix}{name}.weight'] = torch_of(weight[i].T)
    gate, up, down = (
      np.asarray(getattr(blocks.moe, name)[i]).swapaxes(1, 2)
      for name in ('gate', 'up', 'down')
    )
    state[f'{prefix}mlp.experts.gate_up_proj'] = torch_of(
      np.concatenate([gate, up], axis=1)
    )
    state[f'{prefix}mlp.experts.down_proj'] = torch_of(down)
  theirs.load_state_dict(state)
  return theirs


def test_logits_and_router_loss_equal_transformers_mixtral(
  one_device: Mesh, random_decoder: Callable, pack: Callable
):
  torch = pytest.importorskip('torch')
  model = random_decoder(one_device, CONFIG)
  theirs = transformers_mixtral(model, CONFIG)
  rows = pack('t' * 9, 't' * 7, length=9, vocab=CONFIG.vocab_size)
  tokens, mask = (
    torch.tensor(x.astype('int64')) for x in (rows.tokens, rows.segments)
  )
  with torch.no_grad():
    expected = theirs(
      input_ids=tokens,
      attention_mask=mask,
      # The auxiliary loss is computed only beside a loss.
      labels=tokens,
    )

  @jax.jit
  def run(model: Decoder, rows: Rows) -> tuple:
    [hidden], statistics = model.run([rows], [Kind.CAUSAL])
    balance = losses.load_balancing_loss(statistics)
    return model.logits(hidden, model.gather_head()), balance

  logits, balance = run(model, rows)
  real = rows.segments > 0
  np.testing.assert_allclose(
    np.asarray(logits)[real][:, : CONFIG.vocab_size],
    expected.logits.numpy()[real],
    atol=LOGIT_TOLERANCE,
  )
  np.testing.assert_allclose(
    balance[0],
    expected.aux_loss.numpy(),
    rtol=LOGIT_TOLERANCE,
  )


def test_a_token_s_output_does_not_depend_on_its_company(one_device: Mesh):
  """Dropless: what other tokens choose takes nothing away."""
  weights = draw(BIASES['one-expert'])
  out, *_ = run_layer(one_device, weights)
  with jax.enable_x64(True):
    alone = apply_in_float64(
      {key: jnp.asarray(w, 'float64') for key, w in weights.items()},
      jnp.asarray(X[3:4, 2:3]),
    )
  np.testing.assert_allclose(
    out[3, 2], alone[0, 0], atol=SUM_TOLERANCE * np.abs(alone).max()
  )


def test_both_streams_are_counted_apart(
  one_device: Mesh, random_decoder: Callable, pack: Callable
):
  model = random_decoder(one_device, CONFIG)
  streams = [
    pack('tt|ttt', 't', length=8), pack('ttttt', '', length=8, seed=1)
  ]  # fmt: skip
  run = jax.jit(
    lambda model, streams: model.run(streams, [Kind.CAUSAL] * len(streams))[1]
  )
  joint = run(model, streams)
  for i, stream in enumerate(streams):
    alone = run(model, [stream])
    for both, one in zip(*map(jax.tree.leaves, (joint, alone)), strict=True):
      np.testing.assert_allclose(both[:, i], one[:, 0], rtol=SUM_TOLERANCE)
  assert joint.tokens.tolist() == [[6, 5]] * CONFIG.num_layers
