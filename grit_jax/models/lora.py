"""Low-rank adapters of projections (LoRA, arXiv 2106.09685).

A projection x W becomes x W + (alpha / rank) drop(x) A B, with A [I, R] drawn
and B [R, O] zero at first, so that a run begins with its base's outputs. Only
the adapters are trained: `split_trained` takes them out of a decoder, and a
gradient is taken with respect to those alone, so that the rest has none.

A module with projections has its adapters by their names in `adapters`. Those
of experts are applied in `moe`.

Why not qwix: it finds a weight by the identity of what a product is called
with, and here a product gets a weight that was sliced out of its stack, cast
and gathered; and it adds nothing to grouped products of experts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grit_jax.config import Config, Dtype, LoraConfig, ModelConfig
from grit_jax.models.projections import (
  AXES,
  axis_sizes,
  find_part,
  multiply,
  projection_axes,
)
from grit_jax.sharding import gather, spec, weight_spec

ADAPTERS = 'adapters'


class Adapter(nnx.Module):
  """The two factors of what is added to one projection.

  Attributes:
    a: [..., I, R].
    b: [..., O, R], the transpose of B: as a weight of the base, it is split
      over devices on its first axis, which is long.
    scale: alpha / rank.
    dropout: The share of the inputs that is dropped in training.
  """

  def __init__(self, a: jax.Array, b: jax.Array, config: LoraConfig):
    """Takes the factors."""
    self.a, self.b = nnx.Param(a), nnx.Param(b)
    self.scale = config.alpha / config.rank
    self.dropout = config.dropout

  def scaled_b(self) -> jax.Array:
    """Returns `b` times `scale`; in float32 before it is cast and gathered."""
    return self.b[...] * self.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
  """What decides which inputs of a step are dropped.

  A token's are drawn from its number alone, so that they are the same when a
  layer is computed again, in chunks of rows, and on every mesh.

  Attributes:
    key: Of a step, or of one of its layers.
    tokens: int32 [B, T], a number for each token of the batch.
  """

  key: jax.Array
  tokens: jax.Array


def project(
  module: Any,
  name: str,
  x: jax.Array,
  dropout: Dropout | None = None,
) -> jax.Array:
  """Applies a projection, and its adapter if it has one.

  Args:
    module: Has the weight as the attribute `name`, and `adapters`.
    name: One of `projections.AXES`.
    x: [B, T, I].
    dropout: Of a step of training; None: nothing is dropped.

  Returns:
    [B, T, O].
  """
  dtype = module.config.dtype
  inputs, outputs = AXES[name]
  weight = gather(getattr(module, name)[...], inputs, outputs, dtype=dtype)
  y = multiply(x, weight, inputs, outputs)
  if name not in module.adapters:
    return y
  adapter = module.adapters[name]
  with jax.named_scope('adapter'):
    if dropout is not None and adapter.dropout:
      x = drop(x, name, adapter.dropout, dropout)
    a = gather(adapter.a[...], inputs, 'rank', dtype=dtype)
    b = gather(adapter.scaled_b(), outputs, 'rank', dtype=dtype)
    low = multiply(x, a, inputs, 'rank')
    return y + multiply(low, b.T, 'rank', outputs)


def drop(x: jax.Array, name: str, rate: float, dropout: Dropout) -> jax.Array:
  """Returns inputs [B, T, I], some zero and the others that much larger."""
  key = jax.random.fold_in(dropout.key, list(AXES).index(name))

  def draw(key: jax.Array, tokens: jax.Array) -> jax.Array:
    def of_token(number: jax.Array) -> jax.Array:
      own = jax.random.fold_in(key, number)
      return jax.random.bernoulli(own, 1 - rate, x.shape[-1:])

    return jax.vmap(jax.vmap(of_token))(tokens)

  rows = spec('rows', 'seq')
  kept = jax.shard_map(
    draw,
    in_specs=(spec(), rows),
    out_specs=spec('rows', 'seq', None),
    check_vma=False,
  )(key, dropout.tokens)
  kept = jax.sharding.reshard(kept, jax.typeof(x).sharding.spec)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def add_adapters(model: Any, config: LoraConfig, key: jax.Array) -> Any:
  """Returns the decoder with new adapters, in float32.

  Args:
    model: A `Decoder`; its own weights are those of the result.
    config: Of rank 1 and more.
    key: For the first factors; the second are zero.
  """
  # Modules of its own, with the same arrays.
  model = jax.tree.map(lambda x: x, model)
  shapes = adapter_shapes(model.config, config)
  targets = target_axes(model.config, config)
  keys = jax.random.split(key, len(targets))
  for key, (path, axes) in zip(keys, targets.items(), strict=True):
    *leading, inputs, outputs = axes
    shape = shapes[adapter_path(path, 'a')]
    a = jax.random.normal(
      key, shape, out_sharding=weight_spec(*leading, inputs, 'rank')
    )
    b = jnp.zeros(
      shapes[adapter_path(path, 'b')],
      out_sharding=weight_spec(*leading, outputs, 'rank'),
    )
    module, _, name = path.rpartition('/')
    # So that x A is of the size of x.
    adapter = Adapter(a * shape[-2] ** -0.5, b, config)
    find_part(model, module).adapters[name] = adapter
  return model


def target_axes(
  model: ModelConfig, config: LoraConfig
) -> dict[str, tuple[str, ...]]:
  """Returns the axes of the projections that have adapters, by path."""
  return {
    path: axes
    for path, axes in projection_axes(model).items()
    if path.rpartition('/')[2] in config.target_names
  }


def adapter_path(path: str, factor: str) -> str:
  """Returns the path of a factor, `a` or `b`, of a projection's adapter."""
  parent, _, name = path.rpartition('/')
  return f'{parent}/{ADAPTERS}/{name}/{factor}'


def adapter_shapes(
  model: ModelConfig, config: LoraConfig
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of all factors, by path."""
  sizes = axis_sizes(model) | {'rank': config.rank}
  shapes = {}
  for path, (*leading, inputs, outputs) in target_axes(model, config).items():
    for factor, long in ('a', inputs), ('b', outputs):
      axes = (*leading, long, 'rank')
      shapes[adapter_path(path, factor)] = tuple(sizes[axis] for axis in axes)
  return shapes


def base_model(config: Config) -> ModelConfig:
  """Returns the model as the base of adapters has it: its dtype as stored."""
  dtype: Dtype = 'float32' if config.lora.base == 'float32' else 'bfloat16'
  return dataclasses.replace(config.model, param_dtype=dtype)


def split_trained(model: Any) -> tuple[Any, Any]:
  """Splits a decoder, or a part of one, into what is trained and the rest.

  Returns:
    Two trees of its structure, with None for what is in the other: the adapters
    and all else. Without adapters all is trained, and the rest is None.
  """
  leaves = jax.tree_util.tree_leaves_with_path(model)
  if not any(map(_is_adapter, [path for path, _ in leaves])):
    return model, None

  def take(adapters: bool) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, x: x if _is_adapter(path) == adapters else None, model
    )

  return take(True), take(False)


def join_trained(trained: Any, rest: Any) -> Any:
  """Undoes `split_trained`."""
  if rest is None:
    return trained
  return jax.tree.map(
    lambda one, other: other if one is None else one,
    trained,
    rest,
    is_leaf=lambda x: x is None,
  )


def _is_adapter(path: tuple) -> bool:
  return any(getattr(key, 'name', None) == ADAPTERS for key in path)
