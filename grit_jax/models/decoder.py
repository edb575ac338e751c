"""The decoder: Mistral's, Mixtral's and Llama's, over streams of packed rows.

Mistral 7B (arXiv 2310.06825): grouped-query attention with rotary positions,
RMS normalisation before each part, SwiGLU; in Mixtral (arXiv 2401.04088) a
mixture of experts in its place. All streams go through the layers
in one pass, so that a layer's weights are gathered once a step; attention
alone treats the streams apart.

Letters of shapes, here and in the package: B rows, T query positions, S key
positions, D model, N heads, K key-value heads, G = N / K, H head size, F
feed-forward, V vocabulary, E experts, L layers; in losses Q queries, P
passages.

Modules are NNX modules used as plain pytrees. Weights are stored as used, [in,
out], and layers are stacked on a leading axis L.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from grit_jax.batch import Rows
from grit_jax.config import ModelConfig
from grit_jax.models import attention, blockwise
from grit_jax.models.lora import (
  Dropout,
  join_trained,
  project,
  split_trained,
)
from grit_jax.models.moe import MoE, RouterStatistics
from grit_jax.models.projections import AXES, multiply
from grit_jax.models.weights import INIT_SCALE, draw_weight, output_scale
from grit_jax.sharding import (
  gather,
  join_rows,
  padded_vocab,
  spec,
  split_rows,
)

PART_INPUT = 'part_input'

# The keys and the values of a layer.
KeysValues = tuple[jax.Array, jax.Array]


def _norm(config: ModelConfig) -> nnx.Param:
  return nnx.Param(jnp.ones((config.embed_dim,), config.param_dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Tokens that are put into a cache of S places, in all rows at the same ones.

  A row's own tokens end where the chunk ends, and a place holds one of its
  tokens or nothing: a row that is shorter begins later.
  """

  tokens: jax.Array  # int32 [B, T]
  positions: jax.Array  # int32 [B, T], of the rotary angles
  real: jax.Array  # bool [B, T]; what is not is left out of the cache
  # The places in the cache that each token sees: int32 [B, T], as `blockwise`.
  first: jax.Array
  last: jax.Array
  start: jax.Array  # int32 [], the place of the first of the T tokens


def _put(cached: jax.Array, new: jax.Array, chunk: Chunk) -> jax.Array:
  """Writes a chunk's [B, T, K, H] into a layer's [B, K, S, H]."""
  new = jnp.swapaxes(new, 1, 2).astype(cached.dtype)
  size = new.shape[2]
  old = jax.lax.dynamic_slice_in_dim(cached, chunk.start, size, axis=2)
  new = jnp.where(chunk.real[:, None, :, None], new, old)
  return jax.lax.dynamic_update_slice_in_dim(cached, new, chunk.start, axis=2)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Root-mean-square normalisation (arXiv 1910.07467, eq. 4), [..., D].

  The mean is taken in float32; a bfloat16 sum of D squares would lose it.
  """
  wide = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normed = (wide * jax.lax.rsqrt(mean + epsilon)).astype(x.dtype)
  return normed * scale.astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    """Draws the projections; `o` smaller, by the depth of the residual sum."""
    self.config = config
    width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    keys = jax.random.split(key, 4)
    shape, logical = (config.embed_dim, width), ('embed', 'heads')
    self.q = draw_weight(keys[0], shape, logical, config)
    shape, logical = (config.embed_dim, kv_width), ('embed', 'kv_heads')
    self.k = draw_weight(keys[1], shape, logical, config)
    self.v = draw_weight(keys[2], shape, logical, config)
    shape, logical = (width, config.embed_dim), ('heads', 'embed')
    scale = output_scale(config)
    self.o = draw_weight(keys[3], shape, logical, config, scale)
    self.adapters: nnx.Dict = nnx.Dict()

  def __call__(
    self,
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    rows: Sequence[int],
    attends: Sequence[attention.Attend],
    dropout: Dropout | None = None,
  ) -> tuple[jax.Array, KeysValues]:
    """Attends within each stream of `x`, [B, T, D], which has `rows` rows.

    Returns:
      [B, T, D], and the keys and values, [B, T, K, H] each.
    """
    q, k, v = self.project(x, angles, dropout)
    parts = zip(attends, *(split_rows(y, rows) for y in (q, k, v)), strict=True)
    with jax.named_scope('attend'):
      out = join_rows([attend(*part) for attend, *part in parts])
    return self.project_back(out, dropout), (k, v)

  def project(
    self,
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    dropout: Dropout | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps [B, T, D] to queries, scaled, keys and values, [B, T, heads, H]."""
    config = self.config

    def split_heads(name: str) -> jax.Array:
      y = project(self, name, x, dropout)
      return y.reshape(
        *y.shape[:2], -1, config.head_dim,
        out_sharding=spec('rows', 'seq', AXES[name][1], 'head_dim'),
      )  # fmt: skip

    scale = config.head_dim**-0.5
    q = attention.rotate(split_heads('q'), angles, scale)
    k = attention.rotate(split_heads('k'), angles)
    return q, k, split_heads('v')

  def project_back(
    self, x: jax.Array, dropout: Dropout | None = None
  ) -> jax.Array:
    """Maps what the heads read, [B, T, N, H], to [B, T, D]."""
    x = x.reshape(*x.shape[:2], -1, out_sharding=spec('rows', 'seq', 'heads'))
    return project(self, 'o', x, dropout)


class MLP(nnx.Module):
  """The SwiGLU feed-forward part (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    """Draws gate, up and down; `down` smaller, as attention's `o`."""
    self.config = config
    keys = jax.random.split(key, 3)
    shape, logical = (config.embed_dim, config.mlp_dim), ('embed', 'mlp')
    self.gate = draw_weight(keys[0], shape, logical, config)
    self.up = draw_weight(keys[1], shape, logical, config)
    scale = output_scale(config)
    self.down = draw_weight(keys[2], shape[::-1], logical[::-1], config, scale)
    self.adapters: nnx.Dict = nnx.Dict()

  def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
    """Maps [B, T, D] to [B, T, D]."""
    hidden = jax.nn.silu(project(self, 'gate', x, dropout))
    hidden = hidden * project(self, 'up', x, dropout)
    return project(self, 'down', hidden, dropout)


class Block(nnx.Module):
  """One layer: attention, then the feed-forward part."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    """Draws one layer's weights."""
    self.config = config
    attention_key, mlp_key = jax.random.split(key)
    self.attention = Attention(config, attention_key)
    if config.num_experts:
      self.moe = MoE(config, mlp_key)
    else:
      self.mlp = MLP(config, mlp_key)
    self.attention_norm = _norm(config)
    self.mlp_norm = _norm(config)

  def add_attention(
    self,
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    rows: Sequence[int],
    attends: Sequence[attention.Attend],
    dropout: Dropout | None = None,
  ) -> tuple[jax.Array, KeysValues]:
    """Maps [B, T, D] to [B, T, D]; see `Attention`."""
    with jax.named_scope('attention'):
      normed = rms_norm(x, self.attention_norm[...], self.config.norm_epsilon)
      out, keys_values = self.attention(normed, angles, rows, attends, dropout)
      return x + out, keys_values

  def extend(
    self, x: jax.Array, layer: KeysValues, chunk: Chunk, angles: tuple
  ) -> tuple[jax.Array, KeysValues]:
    """Maps a chunk's [B, T, D] to [B, T, D], and puts it into the cache.

    Args:
      x: the tokens.
      layer: this layer's keys and values so far, [B, K, S, H] each.
      chunk: where the tokens stand.
      angles: of their positions.

    Returns:
      [B, T, D], and the keys and values with those of the chunk.
    """
    with jax.named_scope('attention'):
      normed = rms_norm(x, self.attention_norm[...], self.config.norm_epsilon)
      q, *new = self.attention.project(normed, angles)
      keys, values = (
        _put(old, y, chunk) for old, y in zip(layer, new, strict=True)
      )
      out = blockwise.attend(q, keys, values, chunk.first, chunk.last)
      x = x + self.attention.project_back(out)
    return self.add_mlp(x, chunk.real[:, :, None])[0], (keys, values)

  def add_mlp(
    self, x: jax.Array, counted: jax.Array, dropout: Dropout | None = None
  ) -> tuple[jax.Array, RouterStatistics | None]:
    """Maps [B, T, D] to [B, T, D]; see `MoE` for the rest."""
    with jax.named_scope('mlp'):
      normed = rms_norm(x, self.mlp_norm[...], self.config.norm_epsilon)
      if not self.config.num_experts:
        return x + self.mlp(normed, dropout), None
      out, statistics = self.moe(normed, counted)
      return x + out, statistics


# A layer of the scan: its weights, and the key of its dropout in training.
Layer = tuple[Block, jax.Array | None]


class Decoder(nnx.Module):
  """Token ids to hidden states, and hidden states to logits.

  Weights: `embed` [V, D], `blocks` stacked on L, `final_norm` [D], `head`
  [D, V] unless tied, and, for embeddings alone, `projection` and
  `projection_bias` where the config has a projection. V is padded to a
  multiple of `sharding.VOCAB_MULTIPLE`.
  """

  def __init__(self, config: ModelConfig, key: jax.Array):
    """Draws all weights; under `jax.jit` each is born in its sharding."""
    self.config = config
    keys = jax.random.split(key, 4)
    shape = (padded_vocab(config), config.embed_dim)
    logical = ('vocab', 'embed')
    # From scratch, tokens of size 1 keep the residual sum theirs until the
    # layers have learnt something, so embeddings tell texts apart from the
    # first step. A table that is the head too would give huge logits.
    scale = INIT_SCALE if config.tie_embeddings else 1.0
    self.embed = draw_weight(keys[0], shape, logical, config, scale)
    layer_keys = jax.random.split(keys[1], config.num_layers)
    self.blocks: Block | nnx.List[Block] = jax.vmap(
      lambda key: Block(config, key)
    )(layer_keys)
    self.final_norm = _norm(config)
    if not config.tie_embeddings:
      self.head = draw_weight(keys[2], shape[::-1], logical[::-1], config)
    if config.projection_dim:
      shape = (config.embed_dim, config.projection_dim)
      self.projection = draw_weight(
        keys[3], shape, ('embed', 'projection'), config
      )
      self.projection_bias = nnx.Param(
        jnp.zeros((config.projection_dim,), config.param_dtype)
      )

  def __call__(
    self,
    streams: Sequence[Rows],
    kinds: Sequence[attention.Kind],
    remat: str = 'none',
    kernel: str = 'auto',
  ) -> list[jax.Array]:
    """Runs all streams through the layers; see `run`."""
    return self.run(streams, kinds, remat, kernel)[0]

  def run(
    self,
    streams: Sequence[Rows],
    kinds: Sequence[attention.Kind],
    remat: str = 'none',
    kernel: str = 'auto',
    dropout: Sequence[Dropout] | None = None,
  ) -> tuple[list[jax.Array], RouterStatistics | None]:
    """Runs all streams through the layers in one pass.

    Args:
      streams: packed rows, [R_i, T] each.
      kinds: one a stream.
      remat: `config.MemoryConfig.remat`.
      kernel: `config.Config.attention_kernel`.
      dropout: of adapters, in training, one a stream, with one key.

    Returns:
      The normalised last hidden states, [R_i, T, D] a stream; and, of a model
      with experts, the router's statistics over all tokens but padding, with
      leading axes [L, streams].
    """
    hidden, (statistics, _) = self._run(
      streams, kinds, remat, kernel, keep=False, dropout=dropout
    )
    return hidden, statistics

  def run_to_cache(
    self, rows: Rows, kind: attention.Kind, kernel: str
  ) -> tuple[jax.Array, list[KeysValues]]:
    """Runs one stream, and keeps what a cache is made of.

    Args:
      rows: packed rows, [R, T].
      kind: its attention.
      kernel: `config.Config.attention_kernel`.

    Returns:
      The normalised last hidden states, [R, T, D], and of each layer the keys,
      rotated, and the values, [R, T, K, H].
    """
    (hidden,), (_, layers) = self._run(
      [rows], [kind], 'none', kernel, keep=True
    )
    if isinstance(self.blocks, Block):
      count = self.config.num_layers
      return hidden, [tuple(x[i] for x in layers) for i in range(count)]
    return hidden, list(layers)

  def _run(
    self,
    streams: Sequence[Rows],
    kinds: Sequence[attention.Kind],
    remat: str,
    kernel: str,
    keep: bool,
    dropout: Sequence[Dropout] | None = None,
  ) -> tuple[list[jax.Array], tuple]:
    """`run`, which keeps keys and values or not."""
    config = self.config
    rows = [stream.tokens.shape[0] for stream in streams]
    x = self._embed(join_rows([stream.tokens for stream in streams]))
    angles = self._angles(join_rows([stream.positions for stream in streams]))
    attends = [
      attention.prepare(stream, kind, config.sliding_window, kernel)
      for stream, kind in zip(streams, kinds, strict=True)
    ]
    # Which stream a token counts in, [B, T, streams]; padding in none.
    counted = join_rows(
      [
        (stream.segments > 0)[:, :, None] & (jnp.arange(len(streams)) == i)
        for i, stream in enumerate(streams)
      ]
    )

    counted = jax.sharding.reshard(counted, spec('rows', 'seq', None))

    keys = None
    if dropout is not None:
      tokens = join_rows([stream.tokens for stream in dropout])
      keys = jax.random.split(dropout[0].key, config.num_layers)

    def dropout_of(key: jax.Array | None) -> Dropout | None:
      return None if key is None else Dropout(key, tokens)

    def add_attention(x: jax.Array, layer: Layer) -> tuple:
      block, key = layer
      x, keys_values = block.add_attention(
        x, angles, rows, attends, dropout_of(key)
      )
      return x, keys_values if keep else None

    def add_mlp(x: jax.Array, layer: Layer) -> tuple:
      block, key = layer
      return block.add_mlp(x, counted, dropout_of(key))

    add_layer = _rematerialise(add_attention, add_mlp, remat)
    with jax.named_scope('layers'):
      x, kept = self._scan_layers(add_layer, x, keys)
    x = rms_norm(x, self.final_norm[...], config.norm_epsilon)
    return split_rows(x, rows), kept

  def _scan_layers(
    self, add_layer: Callable, x: jax.Array, keys: jax.Array | None
  ) -> tuple:
    """Runs a layer's function over the blocks, stacked or one by one."""
    if isinstance(self.blocks, Block):
      return jax.lax.scan(add_layer, x, (self.blocks, keys))
    kept = []
    for block in self.blocks:
      x, one = add_layer(x, (block, None))
      kept.append(one)
    statistics, keys_values = zip(*kept, strict=True)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *statistics)
    return x, (stacked, keys_values)

  def _embed(self, tokens: jax.Array) -> jax.Array:
    """Looks up token ids, [B, T], as [B, T, D]."""
    with jax.named_scope('embed'):
      dtype = self.config.dtype
      table = gather(self.embed[...], 'vocab', 'embed', dtype=dtype)
      return table.at[tokens].get(out_sharding=spec('rows', 'seq', 'embed'))

  def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    config = self.config
    frequencies = attention.rotary_frequencies(
      config.head_dim, config.rope_theta, config.rotary_scaling
    )
    return attention.rotary_angles(positions, frequencies)

  def unstack(self) -> 'Decoder':
    """Returns the same decoder with a block a layer, for inference.

    Out of a stack a loop has to copy each layer's weights before it multiplies
    by them, which for the one token of a decoding step is most of the work: a
    CPU takes 2.8 times as long.
    """
    model = nnx.clone(self)
    model.blocks = nnx.List(self._list_blocks())
    return model

  def _list_blocks(self) -> list[Block]:
    if not isinstance(self.blocks, Block):
      return list(self.blocks)
    return [
      jax.tree.map(operator.itemgetter(layer), self.blocks)
      for layer in range(self.config.num_layers)
    ]

  def extend(
    self, chunk: Chunk, cache: Sequence[KeysValues]
  ) -> tuple[jax.Array, list[KeysValues]]:
    """Runs some tokens after those in a cache, and puts them into it.

    Args:
      chunk: the tokens, and where they stand.
      cache: of each layer keys, rotated, and values, [B, K, S, H].

    Returns:
      The normalised last hidden states, [B, T, D], and the cache with the
      tokens' keys and values.
    """
    x, angles = self._embed(chunk.tokens), self._angles(chunk.positions)
    extended = []
    with jax.named_scope('layers'):
      for block, layer in zip(self._list_blocks(), cache, strict=True):
        x, layer = block.extend(x, layer, chunk, angles)
        extended.append(layer)
    return rms_norm(x, self.final_norm[...], self.config.norm_epsilon), extended

  def gather_head(self) -> jax.Array:
    """Returns the head for `logits`, [D, V], to be gathered once a loop."""
    dtype = self.config.dtype
    if self.config.tie_embeddings:
      return gather(self.embed[...], 'vocab', 'embed', dtype=dtype).T
    return gather(self.head[...], 'embed', 'vocab', dtype=dtype)

  def logits(self, hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Scores the next token, float32 [B, T, V] with V padded.

    The padding's columns are the least float, so no softmax sees them.
    """
    logits = multiply(hidden, head, 'embed', 'vocab', jnp.float32)
    if head.shape[1] == self.config.vocab_size:
      return logits
    real = jnp.arange(head.shape[1]) < self.config.vocab_size
    return jnp.where(real, logits, jnp.finfo(jnp.float32).min)

  def project(self, pooled: jax.Array) -> jax.Array:
    """Maps pooled states, float32 [R, S, D], to the embedding's width."""
    if not self.config.projection_dim:
      return pooled
    weight = gather(
      self.projection[...], 'embed', 'projection', dtype='float32'
    )
    return (
      jnp.einsum(
        'rsd,dp->rsp', pooled, weight, precision=jax.lax.Precision.HIGHEST
      )
      + self.projection_bias[...]
    )


def _rematerialise(
  add_attention: Callable, add_mlp: Callable, remat: str
) -> Callable:
  """Returns a layer's two parts as the body of the layer scan.

  Args:
    add_attention: the first part, of `x` and a `Layer`; returns `x` and what is
      kept of it.
    add_mlp: the second part; returns `x` and the router's statistics.
    remat: `config.MemoryConfig.remat`.
  """
  if remat == 'offload':
    add_attention, add_mlp = _offload(add_attention), _offload(add_mlp)

  def add_layer(x: jax.Array, layer: Layer) -> tuple:
    x, kept = add_attention(x, layer)
    x, statistics = add_mlp(x, layer)
    return x, (statistics, kept)

  if remat == 'offload':
    return add_layer
  policies = jax.checkpoint_policies
  policy = {
    'none': policies.save_from_both_policies(
      _is_product, policies.save_only_these_names(blockwise.KEPT)
    ),
    'full': policies.nothing_saveable,
  }[remat]
  return jax.checkpoint(add_layer, policy=policy, prevent_cse=False)


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
  """Says which operations of a layer take so long that `none` keeps them.

  The rest is cheaper to compute again than to write into the scan's stacks and
  read from there.
  """
  return primitive.name in (
    'dot_general', 'ragged_dot_general', 'pallas_call',
  )  # fmt: skip


def _offload(part: Callable) -> Callable:
  """Computes a part again for its gradient, from its input on the host.

  What a part keeps for its gradient is only in memory while that is computed:
  no part of the gradient is used before all of it is there, and the part before
  is computed again after that.
  """

  def named(x: jax.Array, layer: Layer) -> Any:
    block, key = layer
    # What is frozen has no gradient to wait for.
    trained, rest = split_trained(block)
    x, trained = finish_together(checkpoint_name(x, PART_INPUT), trained)
    return part(x, (join_trained(trained, rest), key))

  policy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[PART_INPUT],
    offload_src='device',
    offload_dst='pinned_host',
  )
  return jax.checkpoint(named, policy=policy)


@jax.custom_vjp
def finish_together(*trees: Any) -> tuple:
  """Returns its arguments; no gradient of them is used before all are there.

  Otherwise the compiler puts products that make weights' gradients off, to hide
  transfers behind them, and what they read stays in memory.
  """
  return trees


def _finish_backward(_: None, cotangents: tuple) -> tuple:
  return jax.lax.optimization_barrier(cotangents)


finish_together.defvjp(lambda *trees: (trees, None), _finish_backward)


def count_parameters(config: ModelConfig) -> int:
  """Returns the number of weights, without the vocabulary's padding."""
  width = config.num_heads * config.head_dim
  kv_width = config.num_kv_heads * config.head_dim
  mlp = 3 * config.mlp_dim
  if config.num_experts:
    mlp = config.num_experts * (mlp + 1)  # With the router's column.
  layer = config.embed_dim * (2 * width + 2 * kv_width + mlp + 2)
  tables = 1 if config.tie_embeddings else 2
  projection = config.projection_dim * (config.embed_dim + 1)
  return (
    config.num_layers * layer
    + tables * config.vocab_size * config.embed_dim
    + config.embed_dim
    + projection
  )
