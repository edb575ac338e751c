"""GritLM-7B: Mistral 7B, trained to embed and to generate.

The recipe of the paper (arXiv 2402.09906, section 3; its tables 1 and 2 give
66.8 on MTEB and 55.5 on the generative tasks), on the E5 pairs and Tulu 2:

  python -m grit_jax.train --config=configs/gritlm_7b.py \
    --config.init_from=FOLDER_OF_MISTRAL_7B --config.data.paths=PAIRS,CHATS \
    --workdir=gs://BUCKET/gritlm_7b

2048 pairs, all of one data set, and 256 conversations a step, 1253 steps;
queries of 256 tokens at most, passages and conversations of 2048; two passages
a query, and those of all others as negatives; bbcc attention, mean pooling,
temperature 0.02; the mean of token means over 8 groups of 32 conversations
("Mix (32 to 8)"); AdamW, 2e-5, no decay, 3% warm-up, linear to 0, gradients
clipped to norm 1.

Departures from the reference, and why:
- The embedding loss has its own weight of 1. There the gradient of negatives
  from other devices is lost, which leaves 1/W of it on W devices; the script of
  the 7B model had 8: `--config=configs/gritlm_7b.py:reference_weight` follows
  that with 1/8. It also takes known positives for negatives, as there.
- Weights, gradients and the optimizer's state are in float32, products in
  bfloat16: an update of 2e-5 is lost in a bfloat16 weight above 0.005.
- Texts are packed into rows, and a batch takes one pass where memory allows:
  there it is padded, and cut for gradient caching. Neither changes the loss.
- A thousandth of the records is held out, to evaluate before and after.

What one step takes, compiled and not measured, for packed rows of 2048 tokens;
512 + 256 are about what these data take. "Executed" is over a forward and a
backward pass:

  topology      rows        GiB a chip  executed  flags
  v5e:8x8       512 + 256        11.88     1.284
  v5e:4x8       512 + 256        10.88     1.260  remat=offload (24 on hosts)
  v5e:4x4       512 + 256        10.94     1.481  remat=offload chunk_rows=64
  v5e:8x8       4352 + 256        6.17     1.600  chunk_rows=256
  2 of v5e:8x8  512 + 256         7.26     1.284
  v6e:4x8       512 + 256        25.85     1.284
  v5p:4x4x2     512 + 256        25.50     1.284

with the flags as `--config.memory.remat=offload`. A chip of v5e has 15.75 GiB,
of v6e 31.25, of v5p 95.74. 4352 + 256 rows is every text at its greatest
length; with `chunk_rows` one program runs every batch up to that. Each line is
the answer of

  python -m grit_jax.aot --config=configs/gritlm_7b.py --topology=v5e:8x8
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
        mask_known_positives=variant != 'reference_weight',
      ),
      optimizer=OptimizerConfig(
        learning_rate=2e-5, warmup_fraction=0.03, schedule='linear'
      ),
      memory=MemoryConfig(remat='full'),
      evaluation=EvaluationConfig(rows=256, held_out_fraction=0.001),
      steps=1253,
    )
  )
