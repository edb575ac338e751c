"""GritLM-7B's embedding half alone: Mistral 7B, trained to embed.

"Emb.-only" of the paper (arXiv 2402.09906, table 1: 66.8 on MTEB, as the joint
model; and 7.6 on the generative tasks, where that has 55.5), on the E5 pairs:

  python -m grit_jax.train --config=configs/embedding_only_7b.py \
    --config.init_from=FOLDER_OF_MISTRAL_7B --config.data.paths=PAIRS \
    --workdir=gs://BUCKET/embedding_only_7b

All is as in `gritlm_7b.py`, without the generative stream: 2048 pairs a step,
1253 steps. With one loss its weight says nothing: Adam divides it out, but for
the clipping of gradients.

Compiled and not measured, 512 packed rows of 2048 tokens take 8.63 GiB a chip
on 64 chips of v5e, and 1.29 times the arithmetic of a forward and a backward
pass:

  python -m grit_jax.aot --topology=v5e:8x8 \
    --config=configs/embedding_only_7b.py
"""

import importlib.util
import pathlib

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration that flags override."""
  path = pathlib.Path(__file__).with_name('gritlm_7b.py')
  spec = importlib.util.spec_from_file_location('gritlm_7b', path)
  gritlm_7b = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(gritlm_7b)
  config = gritlm_7b.get_config()
  config.objective.mode = 'embedding'
  return config
