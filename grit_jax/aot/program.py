"""The train step of a config, with abstract arguments on a topology's mesh."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grit_jax import objective, optimizer, sharding
from grit_jax.aot.flops import count_flops
from grit_jax.batch import Batch, EmbeddingRows, GenerativeRows, Rows
from grit_jax.config import Config
from grit_jax.errors import UserError
from grit_jax.models.decoder import Decoder
from grit_jax.models.lora import (
  add_adapters,
  base_model,
  join_trained,
  split_trained,
)
from grit_jax.models.quantization import quantize
from grit_jax.objective import TrainState


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Packed rows of a step, in both streams."""

  embedding_rows: int
  generative_rows: int


def abstract_state(
  config: Config, mesh: Mesh
) -> tuple[TrainState, Decoder | None]:
  """Returns the types of the state, each in its sharding.

  And those of what is frozen beside it, of a run that trains adapters.
  """
  transformation = optimizer.make_optimizer(config.optimizer, config.steps)

  def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec = x.sharding.spec if x.sharding is not None else P()
    stored = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stored)

  def create() -> tuple[TrainState, Decoder | None]:
    key, frozen = jax.random.key(0), None
    if config.lora.rank:
      model = Decoder(base_model(config), key)
      if config.lora.quantization:
        model = quantize(model, config.lora.quantization)
      model, frozen = split_trained(add_adapters(model, config.lora, key))
    else:
      model = Decoder(config.model, key)
    return objective.create_state(transformation, model), frozen

  return jax.tree.map(place, jax.eval_shape(create))


def abstract_batch(config: Config, mesh: Mesh, sizes: Sizes) -> Batch:
  """Returns the types of a batch, placed as the pipeline places one.

  Raises:
    UserError: the rows of one pass do not divide over the mesh.
  """
  data = config.data
  pairs, passages = data.embedding_batch, data.num_passages
  # The fields that are not [rows, tokens].
  texts = {
    'query_slots': ((pairs,), 'int32'),
    'passage_slots': ((pairs, passages), 'int32'),
    'scored': ((pairs, pairs * passages), 'bool'),
    'chunks': ((), 'int32'),
  }
  dtypes = {
    'tokens': 'int32', 'segments': 'int32', 'positions': 'int32',
    'in_instruction': 'bool', 'loss_weights': 'float32',
  }  # fmt: skip

  def make(kind: type, rows: int) -> Any:
    fields = {}
    for field in dataclasses.fields(kind):
      if field.name == 'rows':
        fields['rows'] = make(Rows, rows)
        continue
      logical: tuple[str | None, ...] = ()
      if field.name in texts:
        shape, dtype = texts[field.name]
      else:
        shape, dtype = _row_shape(config, rows), dtypes[field.name]
        logical = (None,) * (len(shape) - 2) + ('rows', 'seq')
      stored = NamedSharding(mesh, sharding.spec(*logical))
      fields[field.name] = jax.ShapeDtypeStruct(shape, dtype, sharding=stored)
    return kind(**fields)

  embedding = generative = None
  if config.objective.has_embedding:
    _check_rows(config, mesh, 'embedding_rows', sizes.embedding_rows)
    embedding = make(EmbeddingRows, sizes.embedding_rows)
  if config.objective.has_generative:
    _check_rows(config, mesh, 'generative_rows', sizes.generative_rows)
    generative = make(GenerativeRows, sizes.generative_rows)
  return Batch(embedding, generative)


def _row_shape(config: Config, rows: int) -> tuple[int, ...]:
  chunk = config.memory.chunk_rows
  if not chunk:
    return (rows, config.data.row_length)
  return (-(-rows // chunk), chunk, config.data.row_length)


def _check_rows(config: Config, mesh: Mesh, name: str, rows: int) -> None:
  shards = sharding.row_shards(mesh)
  if not config.memory.chunk_rows and rows % shards:
    raise UserError(
      f'--{name}={rows} does not divide over the {shards} devices that split '
      f'rows. {-(-rows // shards) * shards} does.'
    )


def make_step(config: Config, options: dict[str, Any]) -> Any:
  """Returns the step that training runs."""
  return objective.make_train_step(
    config,
    optimizer.make_optimizer(config.optimizer, config.steps),
    optimizer.make_schedule(config.optimizer, config.steps),
    options,
  )


def measure_flops(
  config: Config,
  mesh: Mesh,
  state: TrainState,
  frozen: Decoder | None,
  sizes: Sizes,
) -> dict[str, float]:
  """Returns the operations of a step: executed, and ideal.

  Ideal is thrice a forward pass over the same rows, nothing computed twice;
  with adapters twice, as frozen weights have no gradient.
  """
  one_pass = dataclasses.replace(
    config,
    memory=dataclasses.replace(config.memory, remat='none', chunk_rows=0),
  )
  chunk = config.memory.chunk_rows
  whole = abstract_batch(
    one_pass, mesh, Sizes(*_padded(config, sizes)) if chunk else sizes
  )
  forward = count_flops(
    jax.make_jaxpr(lambda m, b: objective.one_pass_loss(m, b, one_pass))(
      join_trained(state.model, frozen), whole
    ).jaxpr,
    mesh.size,
  )
  batch = abstract_batch(config, mesh, sizes)
  if not chunk:
    gradient = objective.one_pass_gradient
    parts = [(batch, 1)]
  else:
    # A stream at a time: its loops take its number of chunks.
    gradient = objective.cached_gradient
    embedding, generative = (n // chunk for n in _padded(config, sizes))
    parts = []
    if batch.embedding is not None:
      parts.append((Batch(batch.embedding, None), embedding))
    if batch.generative is not None:
      parts.append((Batch(None, batch.generative), generative))
  executed = 0.0
  for part, trips in parts:
    traced = jax.make_jaxpr(lambda m, b, f: gradient(m, b, config, f))(
      state.model, part, frozen
    )
    executed += count_flops(traced.jaxpr, mesh.size, trips)
  passes = 3 if frozen is None else 2
  return {
    'executed_petaflops': executed / 1e15,
    'ideal_petaflops': passes * forward / 1e15,
    'ideal_forward_passes': passes,
  }


def _padded(config: Config, sizes: Sizes) -> tuple[int, int]:
  """Returns the rows of both streams, padded to whole chunks."""
  chunk = config.memory.chunk_rows
  return tuple(-(-rows // chunk) * chunk for rows in dataclasses.astuple(sizes))


def describe_shapes(
  config: Config, mesh: Mesh, model: Decoder, sizes: Sizes
) -> dict[str, Any]:
  """Returns what tells a device's buffers apart, and how often loops run.

  `stored` and `gathered` are the shapes of weights on a device, `layer_inputs`
  that of what all layers keep, `vocabulary` the columns of logits, and `loops`
  the lengths of the loops over chunks.
  """
  stored, gathered = set(), set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    if 'norm' in jax.tree_util.keystr(path):
      continue
    shape = leaf.sharding.shard_shape(leaf.shape)
    stored.add(shape)
    layers = 'blocks' in jax.tree_util.keystr(path)
    tensor = P(*(
      'tensor' if 'tensor' in _names(axis) else
      'expert' if axis == 'expert' else None
      for axis in leaf.sharding.spec
    ))  # fmt: skip
    whole = NamedSharding(leaf.sharding.mesh, tensor).shard_shape(leaf.shape)
    whole = whole[1:] if layers else whole
    if leaf.dtype == 'uint8':  # Two to a byte, before they are turned back.
      whole = (*whole[:-2], 2 * whole[-2], whole[-1])
    gathered.add(whole)
  data, chunk = config.data, config.memory.chunk_rows
  has_embedding = config.objective.has_embedding
  has_generative = config.objective.has_generative
  rows = chunk
  loops = []
  if chunk:
    embedding, generative = (n // chunk for n in _padded(config, sizes))
    loops += [embedding] * 2 * has_embedding
    # The router's statistics take a pass of their own.
    passes = 2 if config.model.num_experts else 1
    loops += [generative] * passes * has_generative
  else:
    rows += sizes.embedding_rows * has_embedding
    rows += sizes.generative_rows * has_generative
  return {
    'stored': sorted(stored),
    'gathered': sorted(gathered),
    'layer_inputs': (
      config.model.num_layers,
      rows // sharding.row_shards(mesh),
      data.row_length,
      config.model.embed_dim,
    ),
    'vocabulary': sharding.padded_vocab(config.model) // mesh.shape['tensor'],
    'loops': loops,
  }


def _names(axis: str | tuple | None) -> tuple:
  return axis if isinstance(axis, tuple) else (axis,)
