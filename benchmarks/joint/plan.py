"""The runs: their sizes, their order, and the configuration of each."""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
from etils import epath
from joint import corpus

from grit_jax import config as configuration
from grit_jax import train
from grit_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvaluationConfig,
  MemoryConfig,
  ModelConfig,
  ObjectiveConfig,
  OptimizerConfig,
)
from grit_jax.data import preparation
from grit_jax.data.sources import sources
from grit_jax.errors import ConfigError
from grit_jax.models import presets

# The core, which runs first and with more seeds; then one change of it each.
CORE = {
  'unified': {},
  'embedding only': {'objective.mode': 'embedding'},
  'generative only': {'objective.mode': 'generative'},
}
VARIANTS = {
  'cccc, weighted mean': {
    'model.attention': 'cccc',
    'model.pooling': 'weightedmean',
  },
  'cccc, last token': {
    'model.attention': 'cccc',
    'model.pooling': 'lasttoken',
  },
  'token loss': {'objective.generative_reduction': 'token'},
  'sample loss': {'objective.generative_reduction': 'sample'},
  'generative weight 0.3': {'objective.generative_weight': 0.3},
  'generative weight 3': {'objective.generative_weight': 3.0},
  'negatives of all sets': {'data.mixing': 'all'},
  # As much data: half or twice as many steps.
  'batches halved': {'batches': 0.5},
  'batches doubled': {'batches': 2},
}
DATA = ','.join(
  f'tfds:code_{name}'
  for name in ('functions', 'methods', 'summaries', 'conversations')
)


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of the corpus, the model and the runs.

  Attributes:
    per_package: functions of a package at most, in train and in test.
    packages: at most; 0: all.
    model: its architecture.
    tokenizer_pieces: of the tokenizer, trained on train.
    text_tokens: of a query and of a passage at most.
    row_tokens: of a row, and of a conversation at most.
    embedding_batch: pairs a step.
    generative_batch: conversations a step.
    steps: of each run.
    learning_rate: of each run.
    seeds: of the core, and of the variants.
  """

  per_package: tuple[int, int]
  packages: int
  model: ModelConfig
  tokenizer_pieces: int
  text_tokens: int
  row_tokens: int
  embedding_batch: int
  generative_batch: int
  steps: int
  learning_rate: float
  seeds: tuple[int, int]


SCALES = {
  # To test this script.
  'tiny': Scale(
    per_package=(30, 40),
    packages=100,
    model=dataclasses.replace(presets.tiny(), vocab_size=0, num_layers=1),
    tokenizer_pieces=400,
    text_tokens=96,
    row_tokens=192,
    embedding_batch=8,
    generative_batch=8,
    steps=2,
    learning_rate=1e-3,
    seeds=(1, 1),
  ),
  'cpu': Scale(
    per_package=(250, 60),
    packages=0,
    model=dataclasses.replace(
      presets.small(), embed_dim=192, num_layers=1, head_dim=48, mlp_dim=384
    ),
    tokenizer_pieces=4096,
    text_tokens=64,
    row_tokens=160,
    embedding_batch=32,
    generative_batch=16,
    steps=150,
    learning_rate=2e-3,
    seeds=(3, 2),
  ),
  'h200': Scale(
    per_package=(4000, 200),
    packages=0,
    model=dataclasses.replace(
      presets.small(), embed_dim=1024, num_layers=12, num_heads=16,
      num_kv_heads=4, mlp_dim=2816, dtype='bfloat16',
    ),
    tokenizer_pieces=16384,
    text_tokens=256,
    row_tokens=512,
    embedding_batch=512,
    generative_batch=128,
    steps=2000,
    learning_rate=5e-4,
    seeds=(5, 3),
  ),
}  # fmt: skip


def make_config(
  scale: Scale, folder: pathlib.Path, changes: dict[str, Any], seed: int
) -> Config:
  """Returns the configuration of a run: the recipe's, with changes."""
  share = changes.get('batches', 1)
  config = Config(
    model=scale.model,
    objective=ObjectiveConfig(mixed_groups=4),
    data=DataConfig(
      paths=DATA,
      tokenizer=str(folder / 'tokenizer.model'),
      tokenizer_pieces=scale.tokenizer_pieces,
      cache_dir=str(folder / 'corpus'),
      embedding_batch=int(scale.embedding_batch * share),
      generative_batch=int(scale.generative_batch * share),
      mixing='none',
      max_query_tokens=scale.text_tokens,
      max_passage_tokens=scale.text_tokens,
      max_generative_tokens=scale.row_tokens,
      row_length=scale.row_tokens,
      max_segments=32,
      row_buckets=2,
    ),
    optimizer=OptimizerConfig(
      learning_rate=scale.learning_rate,
      warmup_fraction=0.05,
      schedule='cosine',
    ),
    memory=MemoryConfig(remat='none'),
    checkpoint=CheckpointConfig(every_steps=100, keep=1),
    evaluation=EvaluationConfig(
      max_queries=2000, max_conversations=500, rows=64
    ),
    steps=int(scale.steps / share),
    seed=seed,
  )
  values = configuration.to_config_dict(config)
  for key, value in changes.items():
    if key != 'batches':
      group, name = key.split('.')
      values[group][name] = value
  return configuration.resolve(values)


def plan_runs(
  scale: Scale, names: list[str]
) -> list[tuple[str, dict[str, Any], int]]:
  """Returns the runs of these names, or all: name, changes and seed."""
  return [
    (name, changes, seed)
    for variants, seeds in zip((CORE, VARIANTS), scale.seeds, strict=True)
    for seed in range(seeds)
    for name, changes in variants.items()
    if name in names or not names
  ]


def check_settings(scale: Scale, folder: pathlib.Path) -> None:
  """Notes the settings in the folder.

  Raises:
    ConfigError: it has others.
  """
  path = folder / 'settings.json'
  settings = {
    'scale': dataclasses.asdict(scale), 'variants': CORE | VARIANTS
  }  # fmt: skip
  text = json.dumps(settings, indent=2)
  if path.exists() and path.read_text() != text:
    raise ConfigError(f'{path} is of other settings. Take another folder.')
  path.write_text(text)


def make_corpus(scale: Scale, folder: pathlib.Path) -> dict[str, Any]:
  """Returns the sizes of the corpus, which is written if it is not there.

  With it comes the tokenizer of all runs.
  """
  path = folder / 'corpus.json'
  if not path.exists():
    sizes = corpus.write_corpus(
      folder / 'corpus' / 'tfds',
      dict(zip(corpus.SPLITS, scale.per_package, strict=True)),
      scale.packages,
    )
    preparation.train_or_load_tokenizer(
      make_config(scale, folder, {}, 0),
      epath.Path(folder),
      sources(DATA, folder / 'corpus' / 'tfds'),
    )
    path.write_text(json.dumps(sizes, indent=2))
  return json.loads(path.read_text())


def run_once(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a run's evaluation found; it runs unless it has ended."""
  path = workdir / 'ended.json'
  if not path.exists():
    start = time.perf_counter()
    found = train.train(config, epath.Path(workdir))
    found['seconds'] = time.perf_counter() - start
    path.write_text(json.dumps(found, indent=2))
    # Each run has functions of its own, which no other uses again.
    jax.clear_caches()
  return json.loads(path.read_text())
