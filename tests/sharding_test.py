"""Tests of the mesh, the table of axes, and what moves between devices."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grit_jax import losses, sharding
from grit_jax.batch import EmbeddingRows, GenerativeRows
from grit_jax.config import (
  Config,
  EvaluationConfig,
  MemoryConfig,
  MeshConfig,
  ModelConfig,
)
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Decoder
from grit_jax.pooling import pool
from grit_jax.sharding import (
  MeshError,
  gather,
  join_rows,
  make_mesh,
  place,
  spec,
  split_rows,
  weight_spec,
)

# Float32 sums over two layers and 16 rows, in another order, relative to the
# largest entry.
MESH_TOLERANCE = 1e-5

MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)]

# Sizes that divide over every mesh above, and a vocabulary that does not.
CONFIG = ModelConfig(
  vocab_size=101,
  embed_dim=32,
  num_layers=2,
  num_heads=8,
  num_kv_heads=4,
  head_dim=10,
  mlp_dim=48,
  dtype='float32',
)

COLLECTIVE = re.compile(
  r' (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)'
)


def find_collectives(program: jax.stages.Compiled) -> list[str]:
  """The lines of a compiled program that move data between devices."""
  lines = program.as_text().splitlines()
  return [line for line in lines if COLLECTIVE.search(line)]


@pytest.fixture(scope='session')
def streams(pack: Callable) -> tuple[EmbeddingRows, GenerativeRows]:
  """Eight rows of texts and sixteen of conversations, on the host."""
  first = pack(*['iitt|itt', 'ttttt|itt'] * 4, length=10, seed=1)
  second = pack(*['iittt', 'itt|iitt', 'ttttttttt', 't'] * 4, length=10, seed=2)
  pooled = (first.segments > 0) & ~first.in_instruction
  none = np.zeros((0,), np.int32)
  weights = np.random.default_rng(0).random(second.tokens.shape)
  weights = (weights * (second.positions > 0)).astype(np.float32)
  return (
    EmbeddingRows(first, pooled, none, none, np.int32(0)),
    GenerativeRows(second, weights, np.int32(0)),
  )


def place_rows(mesh: Mesh, batch):
  """Puts each [R, T] field on the mesh by rows."""
  return jax.tree.map(
    lambda x: place(mesh, x, 'rows', 'seq') if x.ndim == 2 else x, batch
  )


def loss(
  model: Decoder, embedding: EmbeddingRows, generative: GenerativeRows
) -> jax.Array:
  """A loss of both streams through one pass."""
  states = model(
    [embedding.rows, generative.rows],
    [Kind.BIDIRECTIONAL, Kind.CAUSAL],
    remat='full',
  )
  pooled = pool(states[0], embedding, 'mean', 2)
  return jnp.sin(pooled).sum() + losses.next_token_loss(
    model, states[1], generative
  )


@pytest.fixture(scope='session')
def results(
  mesh_of: Callable, random_decoder: Callable, streams: tuple
) -> Callable:
  """Loss and gradient of `loss` on a mesh, and the compiled program."""
  known = {}

  def compute(*sizes: int) -> tuple:
    if sizes not in known:
      mesh = mesh_of(*sizes)
      model = random_decoder(mesh, CONFIG)
      with jax.set_mesh(mesh):
        batch = [place_rows(mesh, stream) for stream in streams]
        program = jax.jit(jax.value_and_grad(loss)).lower(model, *batch)
        program = program.compile()
        known[sizes] = (*program(model, *batch), model, program)
    return known[sizes]

  return compute


@pytest.fixture(autouse=True, scope='module')
def several_chunks_of_logits():
  """Lets a row of ten tokens take three chunks."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(losses, 'LOGIT_POSITIONS', 4)
    yield


@pytest.mark.parametrize('sizes', MESHES)
def test_loss_and_gradient_are_those_of_one_device(
  results: Callable, sizes: tuple
):
  expected_loss, expected, *_ = results(1, 1, 1)
  actual_loss, actual, *_ = results(*sizes)
  np.testing.assert_allclose(actual_loss, expected_loss, rtol=MESH_TOLERANCE)
  paths = jax.tree_util.tree_leaves_with_path(expected)
  for (path, x), y in zip(paths, jax.tree.leaves(actual), strict=True):
    scale = np.abs(x).max()
    assert scale > 0
    np.testing.assert_allclose(
      y, x, atol=MESH_TOLERANCE * scale, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize('sizes', MESHES)
def test_gradients_are_sharded_as_their_weights(
  results: Callable, sizes: tuple
):
  _, gradient, model, program = results(*sizes)
  _, compiled = program.output_shardings
  weights = jax.tree_util.tree_leaves_with_path(model)
  shardings = jax.tree.leaves(compiled)
  for (path, x), y, z in zip(
    weights, jax.tree.leaves(gradient), shardings, strict=True
  ):
    assert y.sharding.is_equivalent_to(x.sharding, x.ndim), path
    assert z.is_equivalent_to(x.sharding, x.ndim), path
