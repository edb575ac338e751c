"""GritLM-7B."""

import dataclasses

import ml_collections

from grit_jax import config as configuration
from grit_jax.config import (
  Config,
  DataConfig,
  EvaluationConfig,
  MemoryConfig,
  ObjectiveConfig,
  OptimizerConfig,
)
from grit_jax.models import presets


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the configuration that flags override.

  Args:
    variant: empty, or `reference_weight`; see above.
  """
  if variant not in ('', 'reference_weight'):
    raise ValueError(f'{variant!r} is no variant: there is reference_weight.')
  return configuration.to_config_dict(
    Config(
      model=dataclasses.replace(
        presets.mistral_7b(), attention='bbcc', pooling='mean'
      ),
      objective=ObjectiveConfig(
        mode='unified',
        temperature=0.02,
        embedding_weight=1 / 8 if variant == 'reference_weight' else 1.0,
        generative_reduction='mixed',
        mixed_groups=8,
      ),
      data=DataConfig(
        embedding_batch=2048,
        generative_batch=256,
        num_passages=2,
        max_query_tokens=256,
        max_passage_tokens=2048,
        max_generative_tokens=2048,
      ),
      optimizer=OptimizerConfig(
        learning_rate=2e-5, warmup_fraction=0.03, schedule='linear'
      ),
      memory=MemoryConfig(remat='full'),
      evaluation=EvaluationConfig(rows=256, held_out_fraction=0.001),
      steps=1253,
    )
  )
