"""Mixtral's mixture of experts (arXiv 2401.04088), dropless and exact.

A token's output is the sum over its `experts_per_token` best experts, weighted
by a softmax over their router logits. Four steps, in one `shard_map`: route,
permute the tokens so that each expert's stand together, multiply group by
group, and put the results back.

Over the mesh axis `expert` the experts are split, and tokens travel. A device
cannot know how many tokens it will get, so they go in rounds of equal size, as
many as the fullest needs: nothing is dropped, whatever the router does, and
shapes are static. Every other axis splits tokens (`data`, `fsdp`) or the
experts' width (`tensor`).

The product is `jax.lax.ragged_dot`, a kernel on TPU (`xla_options`). On GPU and
CPU XLA multiplies by all experts of a device, and masks: the same result for
that many times the arithmetic. With one expert a device, `mesh.expert` equal to
`model.num_experts`, that is no more than what tokens need.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from grit_jax.config import ModelConfig
from grit_jax.models.weights import INIT_SCALE, draw_weight, output_scale
from grit_jax.sharding import ROWS, STORED, gather, spec, weight_spec

# The axes of the weights.
LOGICAL = {
  'router': ('embed', 'router'),
  'gate': ('experts', 'embed', 'mlp'),
  'up': ('experts', 'embed', 'mlp'),
  'down': ('experts', 'mlp', 'embed'),
}

# The weights of a device's experts by name; adapters are `gate_a`, `gate_b`.
Experts = dict[str, jax.Array]

# A round takes this many times the tokens of an even spread over devices: most
# steps then need one.
ROUND_SLACK = 1.25


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStatistics:
  """Sums over the tokens of each of S streams; linear, so those of chunks add.

  The decoder puts an axis of layers in front.
  """

  tokens: jax.Array  # float32 [S], tokens
  chosen: jax.Array  # float32 [S, E], how often an expert was chosen
  probability: jax.Array  # float32 [S, E], of the softmax over all experts
  entropy: jax.Array  # float32 [S], of that softmax, in nats
  squared_normaliser: jax.Array  # float32 [S], log of its denominator, squared


def router_statistics(
  logits: jax.Array, chosen: jax.Array, counted: jax.Array
) -> RouterStatistics:
  """Sums over the tokens of one device.

  Args:
    logits: float32 [n, E].
    chosen: int32 [n, k], the experts of each token.
    counted: bool [n, S], which stream each token counts in.
  """
  weights = counted.astype(jnp.float32).T
  log_normaliser = jax.nn.logsumexp(logits, axis=-1)
  log_probability = logits - log_normaliser[:, None]
  probability = jnp.exp(log_probability)
  experts = jnp.arange(logits.shape[1])
  times_chosen = (chosen[:, :, None] == experts).sum(axis=1)
  add = partial(jnp.matmul, weights, precision=jax.lax.Precision.HIGHEST)
  return RouterStatistics(
    tokens=weights.sum(axis=1),
    chosen=add(times_chosen.astype(jnp.float32)),
    probability=add(probability),
    entropy=add(-(probability * log_probability).sum(axis=-1)),
    squared_normaliser=add(jnp.square(log_normaliser)),
  )


class MoE(nnx.Module):
  """The feed-forward part of a layer with experts."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    """Draws router, gate, up and down, the latter three for all experts."""
    self.config = config
    experts, dim, mlp = config.num_experts, config.embed_dim, config.mlp_dim
    shapes = {
      'router': (dim, experts),
      'gate': (experts, dim, mlp),
      'up': (experts, dim, mlp),
      'down': (experts, mlp, dim),
    }
    keys = jax.random.split(key, len(shapes))
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
      scale = output_scale(config) if name == 'down' else INIT_SCALE
      weight = draw_weight(key, shape, LOGICAL[name], config, scale)
      setattr(self, name, weight)
    self.adapters: nnx.Dict = nnx.Dict()

  def __call__(
    self, x: jax.Array, counted: jax.Array
  ) -> tuple[jax.Array, RouterStatistics]:
    """Maps [B, T, D] to [B, T, D].

    Args:
      x: the tokens.
      counted: bool [B, T, S], which stream's statistics a token is in.

    Returns:
      The outputs, and the statistics of all devices' tokens.
    """
    weights = {name: getattr(self, name)[...] for name in LOGICAL}
    axes = dict(LOGICAL)
    for name, adapter in self.adapters.items():
      experts, inputs, outputs = LOGICAL[name]
      weights[f'{name}_a'] = adapter.a[...]
      axes[f'{name}_a'] = (experts, inputs, 'rank')
      weights[f'{name}_b'] = adapter.scaled_b()
      axes[f'{name}_b'] = (experts, outputs, 'rank')
    # What is quantised is gathered before: it needs no gradient.
    whole = {
      name: gather(weight, *axes[name], dtype=self.config.dtype)
      for name, weight in weights.items()
      if not isinstance(weight, jax.Array)
    }
    stored = {
      name: weight for name, weight in weights.items() if name not in whole
    }
    rows = spec('rows', 'seq', 'embed')
    return jax.shard_map(
      partial(_mix, k=self.config.experts_per_token, dtype=self.config.dtype),
      in_specs=(
        rows,
        spec('rows', 'seq', None),
        {name: weight_spec(*axes[name]) for name in stored},
        {name: spec(*axes[name]) for name in whole},
      ),
      out_specs=(rows, P()),
      check_vma=False,
    )(x, counted, stored, whole)


def _gather(weights: dict[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
  """All-gathers the shards of a device; the transpose is a reduce-scatter.

  As `sharding.gather`, for the inside of a `shard_map`, whose type system does
  not take ragged products of `reduced` weights.
  """
  gathered = {}
  for name, weight in weights.items():
    # The router's logits decide, and near ties are common: float32.
    weight = weight.astype('float32' if name == 'router' else dtype)
    first, axis = (STORED[1:], 0) if name == 'router' else (('pair',), 1)
    for axes in (first, 'fsdp'):
      weight = jax.lax.all_gather(weight, axes, axis=axis, tiled=True)
    gathered[name] = weight
  return gathered


def _mix(
  x: jax.Array,
  counted: jax.Array,
  stored: dict[str, jax.Array],
  whole: dict[str, jax.Array],
  *,
  k: int,
  dtype: str,
) -> tuple[jax.Array, RouterStatistics]:
  """The whole on one device's rows, [b, T, D]; see `MoE.__call__`."""
  tokens = x.reshape(-1, x.shape[-1])
  experts = _gather(stored, dtype) | whole
  router = experts.pop('router')
  with jax.named_scope('route'):
    logits = jnp.einsum(
      'nd,de->ne',
      tokens.astype(jnp.float32),
      router,
      precision=jax.lax.Precision.HIGHEST,
    )
    best, chosen = jax.lax.top_k(logits, k)
    share = jax.nn.softmax(best, axis=-1)
    statistics = router_statistics(
      logits, chosen, counted.reshape(len(tokens), -1)
    )
    statistics = jax.lax.psum(statistics, ROWS)
  if jax.lax.axis_size('expert') == 1:
    out = _apply_at_home(tokens, chosen, experts)
  else:
    out = _apply_by_travel(tokens, chosen, experts)
  with jax.named_scope('combine'):
    out = jnp.einsum('nkd,nk->nd', out, share.astype(out.dtype))
    out = jax.lax.psum(out, 'tensor')
  return out.reshape(x.shape), statistics


def _multiply(rows: jax.Array, sizes: jax.Array, experts: Experts) -> jax.Array:
  """SwiGLU of rows [m, D] that stand by expert, `sizes` [E] of them each.

  With `tensor` greater than 1 a result is the part of this device's features.
  """

  def project(name: str, x: jax.Array) -> jax.Array:
    y = jax.lax.ragged_dot(x, experts[name], sizes)
    if f'{name}_a' not in experts:
      return y
    low = jax.lax.ragged_dot(x, experts[f'{name}_a'], sizes)
    second = jnp.swapaxes(experts[f'{name}_b'], 1, 2)
    return y + jax.lax.ragged_dot(low, second, sizes)

  hidden = jax.nn.silu(project('gate', rows)) * project('up', rows)
  return project('down', hidden)


def _apply_at_home(
  tokens: jax.Array, chosen: jax.Array, experts: Experts
) -> jax.Array:
  """Applies experts that are all here, to [n, D]; [n, k, D]."""
  n, k = chosen.shape
  with jax.named_scope('permute'):
    order = jnp.argsort(chosen.reshape(-1))
    rows = tokens[order // k]
  sizes = jnp.bincount(chosen.reshape(-1), length=experts['gate'].shape[0])
  with jax.named_scope('experts'):
    out = _multiply(rows, sizes.astype(jnp.int32), experts)
  with jax.named_scope('unpermute'):
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
  return out.reshape(n, k, -1)


@jax.custom_vjp
def _apply_by_travel(
  tokens: jax.Array, chosen: jax.Array, experts: Experts
) -> jax.Array:
  """Applies experts that are split over `expert`, to [n, D]; [n, k, D].

  The sum of as many rounds as the fullest device needs. A traced number of
  rounds has no reverse mode of its own: `_travel_backward` sums theirs.
  """
  journey = _plan(chosen, experts['gate'].shape[0])
  shape = (*chosen.shape, tokens.shape[1])

  def add(number: jax.Array, out: jax.Array) -> jax.Array:
    return out + _round(number, tokens, experts, journey, shape)

  return jax.lax.fori_loop(
    0, journey.rounds, add, jnp.zeros(shape, tokens.dtype)
  )


def _travel_forward(
  tokens: Any, chosen: Any, experts: dict[str, Any]
) -> tuple[jax.Array, tuple]:
  # Frozen experts have no gradient, which would be as large as they are.
  trained = {name: x.value for name, x in experts.items() if x.perturbed}
  frozen = {name: x.value for name, x in experts.items() if not x.perturbed}
  out = _apply_by_travel(tokens.value, chosen.value, trained | frozen)
  return out, (tokens.value, chosen.value, trained, frozen)


def _travel_backward(saved: tuple, cotangent: Any) -> tuple:
  tokens, chosen, trained, frozen = saved
  if isinstance(cotangent, SymbolicZero):
    return None, None, None
  journey = _plan(chosen, (trained | frozen)['gate'].shape[0])

  def add(number: jax.Array, total: tuple) -> tuple:
    _, pull_back = jax.vjp(
      lambda tokens, trained: _round(
        number, tokens, trained | frozen, journey, cotangent.shape
      ),
      tokens,
      trained,
    )
    return jax.tree.map(jnp.add, total, pull_back(cotangent))

  # The sum over rounds is in float32: bfloat16 would round it in every one.
  inputs = (tokens, trained)
  start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), inputs)
  total = jax.lax.fori_loop(0, journey.rounds, add, start)
  of_tokens, of_experts = jax.tree.map(
    lambda x, like: x.astype(like.dtype), total, inputs
  )
  return of_tokens, None, of_experts | dict.fromkeys(frozen)


_apply_by_travel.defvjp(_travel_forward, _travel_backward, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class _Journey:
  """Who goes where, for one device's n * k choices in the order of experts."""

  order: jax.Array  # int32 [n * k], choices by expert
  expert: jax.Array  # int32 [n * k], the expert's number on its device
  starts: jax.Array  # int32 [devices], where a device's choices begin
  counts: jax.Array  # int32 [devices], how many go to a device
  size: int  # choices a device gets of this one in a round
  rounds: jax.Array  # int32 [], the same on all devices
  choices: int  # k


def _plan(chosen: jax.Array, experts_here: int) -> _Journey:
  devices = jax.lax.axis_size('expert')
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat)
  counts = jnp.bincount(flat // experts_here, length=devices)
  size = math.ceil(ROUND_SLACK * flat.size / devices)
  rounds = -(-counts.max() // size)
  return _Journey(
    order=order,
    expert=flat[order] % experts_here,
    starts=jnp.cumsum(counts) - counts,
    counts=counts,
    size=size,
    rounds=jax.lax.pmax(rounds, ROWS),
    choices=chosen.shape[1],
  )


def _round(
  number: jax.Array,
  tokens: jax.Array,
  experts: Experts,
  journey: _Journey,
  shape: tuple[int, ...],
) -> jax.Array:
  """One round's results, [n, k, D], zero for choices of other rounds."""
  place = number * journey.size + jnp.arange(journey.size)
  valid = place < journey.counts[:, None]  # [devices, size]
  sorted_place = jnp.where(valid, journey.starts[:, None] + place, 0)
  choice = journey.order[sorted_place]
  here = experts['gate'].shape[0]
  with jax.named_scope('dispatch'):
    sent = jnp.where(valid[..., None], tokens[choice // journey.choices], 0)
    # What is no token goes behind all experts.
    expert = jnp.where(valid, journey.expert[sorted_place], here)
    got = jax.lax.all_to_all(sent, 'expert', 0, 0)
    expert = jax.lax.all_to_all(expert, 'expert', 0, 0).reshape(-1)
  with jax.named_scope('experts'):
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=here + 1)[:here].astype(jnp.int32)
    rows = got.reshape(-1, got.shape[-1])[order]
    out = _multiply(rows, sizes, experts)
    # Rows behind the last group are nobody's; the product may hold anything.
    out = jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], out, 0)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
  with jax.named_scope('return'):
    back = jax.lax.all_to_all(out.reshape(got.shape), 'expert', 0, 0)
    results = jnp.zeros((shape[0] * shape[1], shape[2]), back.dtype)
    target = jnp.where(valid, choice, results.shape[0])
    results = results.at[target].add(back, mode='drop')
  return results.reshape(shape)
