"""GritLM-7B's generative half alone: Mistral 7B, trained to generate.

"Gen.-only" of the paper (arXiv 2402.09906, table 2: 55.2 on the generative
tasks, where the joint model has 55.5; and 41.2 on MTEB), on Tulu 2:

  python -m grit_jax.train --config=configs/generative_only_7b.py \
    --config.init_from=FOLDER_OF_MISTRAL_7B --config.data.paths=CHATS \
    --workdir=gs://BUCKET/generative_only_7b

All is as in `gritlm_7b.py`, without the embedding stream: 256 conversations a
step, 1253 steps, the mean of token means over 8 groups of 32.

Compiled and not measured, 256 packed rows of 2048 tokens take 5.72 GiB a chip
on 64 chips of v5e, and 1.28 times the arithmetic of a forward and a backward
pass:

  python -m grit_jax.aot --topology=v5e:8x8 \
    --config=configs/generative_only_7b.py
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
  config.objective.mode = 'generative'
  return config
