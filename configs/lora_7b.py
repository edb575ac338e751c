"""Adapters for Mistral 7B on one chip: GRIT as QLoRA (arXiv 2305.14314).

Adapters of rank 16 on all projections, over a base in nf4, for one TPU v5e
chip, as Colab lends one:

  python -m grit_jax.train --config=configs/lora_7b.py \
    --config.init_from=FOLDER_OF_MISTRAL_7B --config.data.paths=PAIRS,CHATS \
    --workdir=runs/lora_7b
"""

import dataclasses

import ml_collections

from grit_jax import config as configuration
from grit_jax.config import (
  Config,
  DataConfig,
  EvaluationConfig,
  LoraConfig,
  MemoryConfig,
  OptimizerConfig,
)
from grit_jax.models import presets


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration that flags override."""
  return configuration.to_config_dict(
    Config(
      model=dataclasses.replace(
        presets.mistral_7b(), attention='bbcc', pooling='mean'
      ),
      data=DataConfig(embedding_batch=64, generative_batch=8),
      optimizer=OptimizerConfig(learning_rate=1e-4),
      lora=LoraConfig(rank=16, alpha=32.0, base='nf4'),
      memory=MemoryConfig(remat='full', chunk_rows=4),
      evaluation=EvaluationConfig(rows=4, held_out_fraction=0.01),
      steps=500,
    )
  )
