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
  `--config=configs/gritlm_8x7b.py:reference_weight` follows that with 1/256.
- Weights, gradients and the optimizer's state are in float32, products in
  bfloat16: an update of 2e-5 is lost in a bfloat16 weight above 0.005.
- Texts are packed into rows: there they are padded. The loss is the same.
- A thousandth of the records is held out, to evaluate before and after.

What one step takes, compiled and not measured, for packed rows of 2048 tokens;
64 + 256 are about what these data take, 512 + 256 what 2048 pairs would.
"Executed" is over a forward and a backward pass:

  topology         rows        GiB a chip  executed  flags
  v5p:4x4x2         64 + 256        37.83     1.351
  v5p:4x4x2        512 + 256        53.79     1.353
  v5p:4x4x2        512 + 256        42.71     1.339  remat=offload (24 on hosts)
  v6e:8x8          512 + 256        21.78     1.339  remat=offload (12 on hosts)
  v6e:8x8          512 + 256        22.19     1.685  chunk_rows=256

with the flags as `--config.memory.remat=offload`. A chip of v5p has 95.74 GiB,
of v6e 31.25. Gradient caching costs a pass more than without experts: the
router's loss needs the statistics of all conversations first. With
`--config.mesh.expert=8` the experts stay on their chips, and tokens go to them,
which pays where a chip has few rows. Each line is the answer of

  python -m grit_jax.aot --config=configs/gritlm_8x7b.py --topology=v5p:4x4x2

with `--embedding_rows=512` where the line says so.
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
        presets.mixtral_8x7b(), attention='bbcc', pooling='mean'
      ),
      objective=ObjectiveConfig(
        embedding_weight=1 / 256 if variant == 'reference_weight' else 1.0,
        generative_reduction='token',
        generative_router_weight=0.02,
      ),
      data=DataConfig(
        embedding_batch=256,
        generative_batch=256,
        mask_known_positives=variant != 'reference_weight',
      ),
      memory=MemoryConfig(remat='full'),
      evaluation=EvaluationConfig(rows=64, held_out_fraction=0.001),
    )
  )
