"""A small Mistral, trained from scratch on the Python standard library.

Unified mode, as GritLM-7B (arXiv 2402.09906): bbcc attention, mean pooling,
temperature 0.02. Two CPU cores take about four minutes:

  python -m grit_jax.train --config=configs/quickstart.py \
    --workdir=runs/quickstart
"""

import dataclasses

import ml_collections

from grit_jax import config as configuration
from grit_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvaluationConfig,
  MemoryConfig,
  ObjectiveConfig,
  OptimizerConfig,
)
from grit_jax.models import presets


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration that flags override."""
  return configuration.to_config_dict(
    Config(
      # One layer: at this many steps a second one costs more than it brings.
      model=dataclasses.replace(presets.small(), num_layers=1),
      objective=ObjectiveConfig(
        generative_reduction='token', generative_weight=0.3
      ),
      data=DataConfig(
        paths='tfds:standard_library',
        tokenizer_pieces=8192,
        embedding_batch=64,
        generative_batch=16,
        num_passages=2,
        max_query_tokens=64,
        # A function's head and first lines; longer ones cost more steps than
        # their ends are worth to a model this small.
        max_passage_tokens=64,
        max_generative_tokens=256,
        row_length=384,
        max_segments=32,
        row_buckets=3,
      ),
      optimizer=OptimizerConfig(
        learning_rate=2e-3, warmup_fraction=0.05, schedule='cosine'
      ),
      memory=MemoryConfig(remat='none'),
      checkpoint=CheckpointConfig(every_steps=50, keep=2),
      evaluation=EvaluationConfig(rows=16, max_conversations=200),
      steps=140,
      log_every=10,
    )
  )
