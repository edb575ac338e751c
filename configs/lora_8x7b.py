"""Adapters for Mixtral 8x7B on eight chips: GRIT as QLoRA (arXiv 2305.14314).

Adapters of rank 16 on all projections, those of each expert too, over a base
in nf4, for eight TPU chips of v6e or v5e:

  python -m grit_jax.train --config=configs/lora_8x7b.py \
    --config.init_from=FOLDER_OF_MIXTRAL_8X7B --config.data.paths=PAIRS,CHATS \
    --workdir=gs://BUCKET/lora_8x7b

256 pairs, all of one data set, and 64 conversations a step; all else is as in
`gritlm_8x7b.py`, but for a learning rate of 1e-4, which suits adapters: of 240
million weights in place of 46,703 million. The router is frozen too; its
losses reach what is before it.

What one step takes, compiled and not measured, for packed rows of 2048 tokens;
64 + 64 are about what these data take at most. "Executed" is over a forward
pass and the half of a backward pass that frozen weights leave:

  topology         rows  GiB a chip  executed  flags
  v6e:2x4       64 + 64       11.58     2.048
  v5e:2x4       64 + 64       11.16     2.048  chunk_rows=8

with the flags as `--config.memory.chunk_rows=8`. A chip of v6e has 31.25 GiB,
of v5e 15.75; the base takes 2.93 of either. It is gathered as bytes, a layer at
a time. Each line is the answer of

  python -m grit_jax.aot --config=configs/lora_8x7b.py --topology=v6e:2x4
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
  ObjectiveConfig,
  OptimizerConfig,
)
from grit_jax.models import presets


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration that flags override."""
  return configuration.to_config_dict(
    Config(
      model=dataclasses.replace(
        presets.mixtral_8x7b(), attention='bbcc', pooling='mean'
      ),
      objective=ObjectiveConfig(
        generative_reduction='token', generative_router_weight=0.02
      ),
      data=DataConfig(embedding_batch=256, generative_batch=64),
      optimizer=OptimizerConfig(learning_rate=1e-4),
      lora=LoraConfig(rank=16, alpha=32.0, base='nf4'),
      memory=MemoryConfig(remat='full', chunk_rows=16),
      evaluation=EvaluationConfig(rows=16, held_out_fraction=0.001),
      steps=1253,
    )
  )
