"""GritLM-8x7B: Mixtral 8x7B, trained to embed and to generate.

The recipe of the paper (arXiv 2402.09906, section 3 and appendix; its tables 1
and 2 give 65.7 on MTEB and 65.7 on the generative tasks), on the E5 pairs and
Tulu 2:

  python -m grit_jax.train --config=configs/gritlm_8x7b.py \
    --config.init_from=FOLDER_OF_MIXTRAL_8X7B --config.data.paths=PAIRS,CHATS \
    --workdir=gs://BUCKET/gritlm_8x7b

256 pairs and 256 conversations a step, 1253 steps; queries of 256 tokens at
most, passages and conversations of 2048; two passages a query; bbcc attention,
mean pooling, temperature 0.02; AdamW, 2e-5, 3% warm-up, linear to 0; Mixtral's
load-balancing loss on generative rows, with Mixtral's weight of 0.02.

Departures from the reference:
- The generative loss is the mean over tokens. There it is their sum over the
  conversations of a batch, times 0.003, which is the same for 333 answer tokens
  a conversation.
- The embedding loss has its own weight of 1. There the gradient of negatives
  from other devices is lost, which leaves 1/W of it on W devices; W was 256:
  `--config.objective.embedding_weight=0.00390625` follows that.
- Weights, gradients and the optimizer's state are in float32, products in
  bfloat16.

The step, compiled for 512 embedding and 256 generative rows of 2048 tokens,
takes 71 GiB of 95 a chip on 32 v5p chips and 37 GiB on 64, and 1.33 times the
arithmetic of a forward and a backward pass. These are more rows than a step of
256 pairs has, unless most passages are as long as can be. On 64 v6e chips, of
31 GiB, 256 and 256 rows fit in that one pass (31 GiB at the most); 512 and 256
need `--config.memory.chunk_rows=64` (23 GiB at the most) or 128 (26), and 1.67
times the arithmetic. With `--config.mesh.expert=8` the experts stay on their
chips, and tokens go to them, for up to 1.97 times the arithmetic: it pays where
a chip has few rows.
"""

import dataclasses

import ml_collections

from grit_jax import config as configuration
from grit_jax.config import (
  Config,
  DataConfig,
  EvaluationConfig,
  MemoryConfig,
  ObjectiveConfig,
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
      data=DataConfig(embedding_batch=256, generative_batch=256),
      memory=MemoryConfig(remat='full'),
      evaluation=EvaluationConfig(rows=64),
    )
  )
