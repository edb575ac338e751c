"""Adapters for Mistral 7B on one chip: GRIT as QLoRA (arXiv 2305.14314).

Adapters of rank 16 on all projections, over a base in nf4, for one TPU v5e
chip, as Colab lends one:

  python -m grit_jax.train --config=configs/lora_7b.py \
    --config.init_from=FOLDER_OF_MISTRAL_7B --config.data.paths=PAIRS,CHATS \
    --workdir=runs/lora_7b

64 pairs, all of one data set, and 8 conversations a step, 500 steps; all else
is as in `gritlm_7b.py`, but for a learning rate of 1e-4, which suits adapters:
of 42 million weights in place of 7,242 million.

`python -m grit_jax.convert to_hf` merges the adapters into the base as it was,
in bfloat16; `to_peft` writes them alone. Neither has the errors of nf4 that the
adapters were trained with.

What one step takes, compiled and not measured, for packed rows of 2048 tokens;
16 + 8 are about what these data take at most. "Executed" is over a forward pass
and the half of a backward pass that frozen weights leave:

  topology        rows  GiB a chip  executed  flags
  v5e:1x1       16 + 8       12.34     1.796
  v5e:1x1       16 + 8        8.64     1.796  chunk_rows=4
  v5e:1x1       16 + 8       12.15     1.429  chunk_rows=0 remat=offload
                                              (24 GiB on the host)

with the flags as `--config.memory.chunk_rows=4`. A chip of v5e has 15.75 GiB,
of which 3.94 are the base's. Each line is the answer of

  python -m grit_jax.aot --config=configs/lora_7b.py --topology=v5e:1x1

One GPU of 80 GB or more holds the base in bfloat16 (`--config.lora.base=
bfloat16`, 14 GiB); that is neither compiled nor measured.
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
      memory=MemoryConfig(remat='full', chunk_rows=8),
      evaluation=EvaluationConfig(rows=8, held_out_fraction=0.01),
      steps=500,
    )
  )
