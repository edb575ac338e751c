"""GRIT's joint objective and the train step.

L = embedding_weight * L_rep + generative_weight * L_gen (arXiv 2402.09906,
eq. 3), and with experts the router's terms, over the global batch, on any mesh.
Two executors of the same loss and gradient: one pass over the whole batch, or
gradient caching in chunks of rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from grit_jax import losses, pooling
from grit_jax.batch import Batch, EmbeddingRows, GenerativeRows, Rows
from grit_jax.config import Config
from grit_jax.models.attention import embedding_kind, generative_kind
from grit_jax.models.decoder import Decoder
from grit_jax.models.lora import Dropout, join_trained
from grit_jax.models.moe import RouterStatistics
from grit_jax.sharding import spec

Metrics = dict[str, jax.Array]
Tree = TypeVar('Tree')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes.

  Attributes:
    step: int32 [], steps done.
    model: the weights that are trained: all, or a decoder's adapters, with None
      for the rest (`lora.split_trained`).
    optimizer: optax's state.
  """

  step: jax.Array
  model: Decoder
  optimizer: optax.OptState


def create_state(
  optimizer: optax.GradientTransformation, model: Decoder
) -> TrainState:
  """Returns the state before the first step; under `jax.jit`, sharded."""
  return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))


def pool_texts(
  model: Decoder, hidden: jax.Array, rows: Rows, max_segments: int
) -> jax.Array:
  """Returns the embeddings of a stream's texts, float32 [R, M, D].

  They are not normalised; M is `max_segments`.
  """
  with jax.named_scope('pool'):
    pooled = pooling.pool(hidden, rows, model.config.pooling, max_segments)
    return model.project(pooled)


def representation_loss(
  pooled: jax.Array, batch: EmbeddingRows, config: Config
) -> tuple[jax.Array, Metrics]:
  """L_rep of the texts in `batch`, from all their embeddings.

  Args:
    pooled: float32 [R, M, D], split over rows.
    batch: its slots say which row and segment is which text, and `scored`
      which of them are compared.
    config: for the temperature and the pairs that would be compared.

  Returns:
    The loss; and it again, the share of queries whose positive scores highest,
    and the pairs that were masked as false negatives.
  """
  flat = pooled.reshape(-1, pooled.shape[-1], out_sharding=spec('rows', None))
  # Every query sees all passages: each device contributes the texts of its
  # rows, and one all-reduce of [Q, D] and [Q, G, D] brings them together.
  everywhere = spec('texts', None)
  queries = flat.at[batch.query_slots].get(out_sharding=everywhere)
  everywhere = spec('texts', None, None)
  passages = flat.at[batch.passage_slots].get(out_sharding=everywhere)
  with jax.named_scope('contrastive_loss'):
    loss, accuracy = losses.contrastive_loss(
      pooling.normalise(queries),
      pooling.normalise(passages),
      batch.scored,
      config.objective.temperature,
    )
  return loss, {
    'loss_rep': loss,
    'in_batch_accuracy': accuracy,
    'masked_negatives': config.data.compared_pairs - batch.scored.sum(),
  }


def router_loss(
  statistics: RouterStatistics | None, streams: Sequence[str], config: Config
) -> tuple[jax.Array, Metrics]:
  """The router's weighted terms, and what it does; 0 without experts.

  Args:
    statistics: of the whole batch, with axes [L, streams].
    streams: `rep` and `gen`, or one of them.
    config: for the weights.
  """
  loss = jnp.zeros((), jnp.float32)
  metrics: Metrics = {}
  if statistics is None:
    return loss, metrics
  with jax.named_scope('router_loss'):
    balance = losses.load_balancing_loss(statistics)
    z_loss = losses.router_z_loss(statistics)
  weights = {
    'rep': config.objective.embedding_router_weight,
    'gen': config.objective.generative_router_weight,
  }
  for i, stream in enumerate(streams):
    loss += weights[stream] * balance[i]
    loss += config.objective.router_z_weight * z_loss[i]
    tokens = jnp.maximum(statistics.tokens[:, i], 1.0)
    load = statistics.chosen[:, i] / tokens[:, None]
    load /= config.model.experts_per_token
    metrics |= {
      f'router_{stream}/balance_loss': balance[i],
      f'router_{stream}/z_loss': z_loss[i],
      f'router_{stream}/entropy': (statistics.entropy[:, i] / tokens).mean(),
      # The share of the choices that its busiest expert has, in any layer.
      f'router_{stream}/busiest': load.max(),
    }
    for expert in range(config.model.num_experts):
      name = f'router_{stream}/load_of_expert_{expert}'
      metrics[name] = load[:, expert].mean()
  return loss, metrics


def _dropout(
  key: jax.Array, stream: int, rows: jax.Array, config: Config
) -> Dropout:
  """Returns the dropout of a stream's rows.

  Args:
    key: of the step.
    stream: 0 for embedding rows, 1 for generative ones.
    rows: int32 [R], their numbers in the batch, which chunks do not change.
    config: for the length of a row.
  """
  length = config.data.row_length
  tokens = (2 * rows[:, None] + stream) * length + jnp.arange(length)
  return Dropout(key, jax.sharding.reshard(tokens, spec('rows', 'seq')))


def one_pass_loss(
  model: Decoder, batch: Batch, config: Config, key: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
  """The joint loss, both streams in one pass through the decoder.

  Args:
    model: all of it.
    batch: of one pass.
    config: the run's.
    key: of the step's dropout; None: nothing is dropped.
  """
  streams, kinds, names = [], [], []
  if batch.embedding is not None:
    streams.append(batch.embedding.rows)
    kinds.append(embedding_kind(config.model.attention))
    names.append('rep')
  if batch.generative is not None:
    streams.append(batch.generative.rows)
    kinds.append(generative_kind(config.model.attention))
    names.append('gen')
  dropout = None
  if key is not None:
    numbers = [jnp.arange(stream.tokens.shape[0]) for stream in streams]
    dropout = [
      _dropout(key, name == 'gen', rows, config)
      for name, rows in zip(names, numbers, strict=True)
    ]
  hidden, statistics = model.run(
    streams, kinds, config.memory.remat, config.attention_kernel, dropout
  )
  loss, metrics = router_loss(statistics, names, config)
  if batch.embedding is not None:
    pooled = pool_texts(
      model, hidden[0], batch.embedding.rows, config.data.max_segments
    )
    loss_rep, metrics_rep = representation_loss(pooled, batch.embedding, config)
    loss += config.objective.embedding_weight * loss_rep
    metrics |= metrics_rep
  if batch.generative is not None:
    total = losses.next_token_loss(model, hidden[-1], batch.generative)
    loss_gen = total / batch.generative.loss_weights.sum()
    loss += config.objective.generative_weight * loss_gen
    metrics |= {'loss_gen': loss_gen}
  return loss, {'loss': loss, **metrics}


def one_pass_gradient(
  model: Decoder,
  batch: Batch,
  config: Config,
  frozen: Decoder | None = None,
  key: jax.Array | None = None,
) -> tuple[Decoder, Metrics]:
  """Returns the gradient of the joint loss, and its metrics.

  Args:
    model: what is trained.
    batch: of one pass.
    config: the run's.
    frozen: the rest of the decoder; None: there is none.
    key: of the step's dropout; None: nothing is dropped.
  """
  gradient, metrics = jax.grad(
    lambda model: one_pass_loss(
      join_trained(model, frozen), batch, config, key
    ),
    has_aux=True,
  )(model)
  return gradient, metrics


def cached_gradient(
  model: Decoder,
  batch: Batch,
  config: Config,
  frozen: Decoder | None = None,
  key: jax.Array | None = None,
) -> tuple[Decoder, Metrics]:
  """The same gradient by gradient caching (arXiv 2101.06983).

  Encode every chunk without keeping what a gradient needs; take the loss's
  gradient at the embeddings; then encode each chunk again and pull that
  gradient back to the weights. Generative chunks add up. Memory is that of one
  chunk and of the embeddings. The trip counts are traced: chunks beyond those
  in use are not computed, and one program serves every batch. The arguments
  are those of `one_pass_gradient`, with a batch of chunks.
  """
  # The sum over chunks is in float32: bfloat16 would round it in every one.
  gradient = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), model)
  loss = jnp.zeros((), jnp.float32)
  metrics: Metrics = {}
  if batch.embedding is not None:
    gradient, loss_rep, metrics_rep = _cached_representation_gradient(
      model, batch.embedding, config, gradient, frozen, key
    )
    loss += loss_rep
    metrics |= metrics_rep
  if batch.generative is not None:
    gradient, loss_gen, metrics_gen = _cached_generative_gradient(
      model, batch.generative, config, gradient, frozen, key
    )
    loss += loss_gen
    metrics |= metrics_gen
  gradient = jax.tree.map(lambda x, like: x.astype(like.dtype), gradient, model)
  return gradient, {'loss': loss, **metrics}


def _no_statistics(model: Decoder, config: Config) -> RouterStatistics | None:
  """Returns the sum of no chunk's statistics, of one stream."""
  if not config.model.num_experts:
    return None
  layers, experts = config.model.num_layers, config.model.num_experts
  scalar, vector = jnp.zeros((layers, 1)), jnp.zeros((layers, 1, experts))
  return RouterStatistics(scalar, vector, vector, scalar, scalar)


def _cached_representation_gradient(
  model: Decoder,
  batch: EmbeddingRows,
  config: Config,
  gradient: Decoder,
  frozen: Decoder | None,
  key: jax.Array | None,
) -> tuple[Decoder, jax.Array, Metrics]:
  """Adds the embedding stream's gradient; returns its loss and metrics too."""
  max_segments = config.data.max_segments
  count, size = batch.rows.tokens.shape[:2]
  width = config.model.projection_dim or config.model.embed_dim
  kind = embedding_kind(config.model.attention)

  def encode(model: Decoder, index: jax.Array) -> tuple:
    model = join_trained(model, frozen)
    numbers = index * size + jnp.arange(size)
    dropout = None if key is None else [_dropout(key, 0, numbers, config)]
    rows = _chunk(batch.rows, index)
    [hidden], statistics = model.run(
      [rows],
      [kind],
      config.memory.remat,
      config.attention_kernel,
      dropout,
    )
    return pool_texts(model, hidden, rows, max_segments), statistics

  def keep(index: jax.Array, carry: tuple) -> tuple:
    cache, total = carry
    pooled, statistics = encode(model, index)
    return cache.at[index].set(pooled), jax.tree.map(jnp.add, total, statistics)

  cache = jnp.zeros(
    (count, size, max_segments, width),
    out_sharding=spec(None, 'rows', None, None),
  )
  start = (cache, _no_statistics(model, config))
  cache, statistics = jax.lax.fori_loop(0, batch.chunks, keep, start)

  def loss_of(
    cache: jax.Array, statistics: RouterStatistics | None
  ) -> tuple[jax.Array, Metrics]:
    # Rows are split over devices within each chunk; a slot counts rows chunk
    # by chunk, so the rows' axis goes first for a local reshape.
    pooled = jnp.swapaxes(cache, 0, 1).reshape(
      size * count, max_segments, width,
      out_sharding=spec('rows', None, None),
    )  # fmt: skip
    slots = dataclasses.replace(
      batch,
      query_slots=_row_major(batch.query_slots, count, size, max_segments),
      passage_slots=_row_major(batch.passage_slots, count, size, max_segments),
    )
    loss_rep, metrics = representation_loss(pooled, slots, config)
    loss, router_metrics = router_loss(statistics, ['rep'], config)
    loss += config.objective.embedding_weight * loss_rep
    return loss, metrics | router_metrics

  (loss, metrics), (cache_gradient, statistics_gradient) = jax.value_and_grad(
    loss_of, argnums=(0, 1), has_aux=True
  )(cache, statistics)

  def add(index: jax.Array, gradient: Decoder) -> Decoder:
    _, pull_back = jax.vjp(lambda model: encode(model, index), model)
    # The statistics of the batch are the sum of the chunks', so their gradient
    # is every chunk's.
    [chunk_gradient] = pull_back(
      (_chunk(cache_gradient, index), statistics_gradient)
    )
    return jax.tree.map(jnp.add, gradient, chunk_gradient)

  gradient = jax.lax.fori_loop(0, batch.chunks, add, gradient)
  return gradient, loss, metrics


def _cached_generative_gradient(
  model: Decoder,
  batch: GenerativeRows,
  config: Config,
  gradient: Decoder,
  frozen: Decoder | None,
  key: jax.Array | None,
) -> tuple[Decoder, jax.Array, Metrics]:
  """Adds the generative stream's gradient; returns its loss and metrics too."""
  kind = generative_kind(config.model.attention)
  scale = 1 / batch.loss_weights.sum()
  size = batch.rows.tokens.shape[1]

  def take(index: jax.Array) -> GenerativeRows:
    return dataclasses.replace(
      batch,
      rows=_chunk(batch.rows, index),
      loss_weights=_chunk(batch.loss_weights, index),
    )

  def run(model: Decoder, index: jax.Array) -> tuple:
    numbers = index * size + jnp.arange(size)
    dropout = None if key is None else [_dropout(key, 1, numbers, config)]
    [hidden], statistics = model.run(
      [take(index).rows],
      [kind],
      config.memory.remat,
      config.attention_kernel,
      dropout,
    )
    return hidden, statistics

  def loss_of(model: Decoder, index: jax.Array) -> tuple:
    model = join_trained(model, frozen)
    hidden, statistics = run(model, index)
    loss = losses.next_token_loss(model, hidden, take(index)) * scale
    return loss, statistics

  def count(index: jax.Array, total: RouterStatistics) -> RouterStatistics:
    _, statistics = run(join_trained(model, frozen), index)
    return jax.tree.map(jnp.add, total, statistics)

  # The gradient of a router's loss needs the statistics of all chunks, which
  # takes a pass of its own.
  statistics = _no_statistics(model, config)
  if statistics is not None:
    statistics = jax.lax.fori_loop(0, batch.chunks, count, statistics)
  (router, metrics), statistics_gradient = jax.value_and_grad(
    lambda statistics: router_loss(statistics, ['gen'], config), has_aux=True
  )(statistics)

  def add(index: jax.Array, carry: tuple) -> tuple[Decoder, jax.Array]:
    gradient, total = carry
    (loss, _), pull_back = jax.vjp(lambda model: loss_of(model, index), model)
    weight = jnp.full((), config.objective.generative_weight, loss.dtype)
    [chunk_gradient] = pull_back((weight, statistics_gradient))
    return jax.tree.map(jnp.add, gradient, chunk_gradient), total + loss

  start = (gradient, jnp.zeros((), jnp.float32))
  gradient, loss_gen = jax.lax.fori_loop(0, batch.chunks, add, start)
  loss = router + config.objective.generative_weight * loss_gen
  return gradient, loss, {'loss_gen': loss_gen, **metrics}


def _chunk(tree: Tree, index: jax.Array) -> Tree:
  """Takes chunk `index` of arrays [chunks, R, ...]."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree
  )


def _row_major(
  slots: jax.Array, count: int, size: int, max_segments: int
) -> jax.Array:
  """Renumbers slots from rows chunk by chunk to rows place by place."""
  row, segment = jnp.divmod(slots, max_segments)
  chunk, place = jnp.divmod(row, size)
  return (place * count + chunk) * max_segments + segment


def make_train_step(
  config: Config,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  compiler_options: dict[str, Any],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns the jitted step; it gives its old state's memory to the new.

  Its arguments are the state, the batch and, of a run that trains adapters,
  the frozen rest of the decoder, which stays.

  Args:
    config: the run's.
    optimizer: of `optimizer.make_optimizer`.
    schedule: its learning rate, for the metrics.
    compiler_options: of `xla_options`.
  """
  gradient_of = (
    cached_gradient if config.memory.chunk_rows else one_pass_gradient
  )

  def train_step(
    state: TrainState, batch: Batch, frozen: Decoder | None = None
  ) -> tuple[TrainState, Metrics]:
    key = None
    if config.lora.rank and config.lora.dropout:
      key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    gradient, metrics = gradient_of(state.model, batch, config, frozen, key)
    with jax.named_scope('optimizer'):
      updates, optimizer_state = optimizer.update(
        gradient, state.optimizer, state.model
      )
      model = optax.apply_updates(state.model, updates)
    metrics |= {
      'grad_norm': optax.tree.norm(gradient),
      'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, model, optimizer_state), metrics

  return jax.jit(
    train_step, donate_argnums=0, compiler_options=compiler_options
  )
