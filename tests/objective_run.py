"""The joint gradient of a small run's first step, for tests, on any mesh."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from grit_jax import objective, sharding
from grit_jax.config import Config, DataConfig, MeshConfig, ObjectiveConfig
from grit_jax.data.dataset import prepare
from grit_jax.data.filling import RowShards
from grit_jax.data.pipeline import HostBatch, Pipeline, place_batch
from grit_jax.data.sources import TRAIN, sources
from grit_jax.data.tokenizer import SentencePieceTokenizer
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.models import presets

# float32 sums in another order over up to 8 devices or chunks; the values are
# of order 1, and a temperature of 0.02 multiplies an embedding's by 50.
MESH_TOLERANCE = 1e-5


def words(rng: np.random.Generator, count: int) -> str:
  letters = 'abcdefghij'
  return ' '.join(
    ''.join(rng.choice(list(letters), rng.integers(1, 5))) for _ in range(count)
  )


def prepare_data(folder: pathlib.Path) -> dict:
  """Writes records of both kinds to a folder; returns the data sets by kind."""
  rng = np.random.default_rng(0)
  texts = [words(rng, 6) for _ in range(200)]
  with open(folder / 'pairs.jsonl', 'w') as file:
    for i in range(48):
      record = {
        'query': ['find ' + texts[i][:3], words(rng, 3)],
        # Some positives are those of several records, so that the loss masks
        # false negatives.
        'pos': [['', texts[i % 7] if i % 3 else words(rng, 10)]],
        'neg': [['', words(rng, 5)], ['', words(rng, 9)]],
      }
      file.write(json.dumps(record) + '\n')
  with open(folder / 'chats.jsonl', 'w') as file:
    for _ in range(48):
      turns = [
        words(rng, int(rng.integers(2, 6)))
        for _ in range(2 * int(rng.integers(1, 3)))
      ]
      file.write(json.dumps({'text': turns}) + '\n')
  tokenizer = SentencePieceTokenizer(train_tokenizer(texts, 300))
  return {
    source.kind: prepare(
      source,
      TRAIN,
      tokenizer,
      folder / 'cache',
      max_query_tokens=48,
      max_passage_tokens=64,
      max_generative_tokens=64,
      min_negatives=2,
      held_out_fraction=0.0,
    )
    for source in sources(str(folder))
  }


def make_config(**changes: Any) -> Config:
  config = Config(
    model=dataclasses.replace(
      presets.tiny(), vocab_size=300, num_kv_heads=2, projection_dim=12
    ),
    objective=ObjectiveConfig(
      embedding_weight=0.7, generative_weight=1.3, mixed_groups=4
    ),
    data=DataConfig(
      paths='unused',
      embedding_batch=12,
      generative_batch=16,
      num_passages=3,
      max_query_tokens=48,
      max_passage_tokens=64,
      max_generative_tokens=64,
      row_length=64,
      max_segments=4,
    ),
    steps=2,
  )
  return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True)
class Result:
  """What step 0 gives on a mesh, in numpy.

  Attributes:
    gradient: of every weight.
    metrics: by name.
    host: the batch before it was placed.
    temporary_bytes: memory of the program beside its arguments and results.
  """

  gradient: Any
  metrics: dict[str, np.ndarray]
  host: HostBatch
  temporary_bytes: int


def gradient_on(
  data: dict, random_decoder: Callable, config: Config, shape: tuple[int, ...]
) -> Result:
  """Compiles the gradient of a config for a mesh, and computes step 0's."""
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = sharding.make_mesh(MeshConfig(*shape), devices)
  sharding.validate(config, mesh)
  chunk_rows = config.memory.chunk_rows
  # The same rows on every mesh; chunks are of fewer.
  shards = RowShards.whole(min(chunk_rows, 4) or 8)
  pipeline = Pipeline(config, [data['embedding']], [data['generative']], shards)
  host = pipeline.build(0)
  function = (
    objective.cached_gradient if chunk_rows else objective.one_pass_gradient
  )
  with jax.set_mesh(mesh):
    model = random_decoder(mesh, config.model)
    batch = place_batch(mesh, host.batch)
    program = jax.jit(function, static_argnums=2).lower(model, batch, config)
    program = program.compile()
    gradient, metrics = jax.tree.map(np.asarray, program(model, batch))
  memory = program.memory_analysis()
  return Result(gradient, metrics, host, memory.temp_size_in_bytes)


def assert_equal(found: Result, expected: Result) -> None:
  """Compares all metrics and all gradients."""
  assert found.metrics.keys() == expected.metrics.keys()
  for name, value in expected.metrics.items():
    np.testing.assert_allclose(
      found.metrics[name], value, rtol=MESH_TOLERANCE, err_msg=name
    )
  leaves = jax.tree_util.tree_leaves_with_path(expected.gradient)
  for (path, one), other in zip(
    leaves, jax.tree.leaves(found.gradient), strict=True
  ):
    scale = np.abs(one).max()
    np.testing.assert_allclose(
      other / scale,
      one / scale,
      atol=MESH_TOLERANCE,
      err_msg=jax.tree_util.keystr(path),
    )
