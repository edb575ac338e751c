"""The quickstart with experts: a small Mixtral on the same text.

As GritLM-8x7B (arXiv 2402.09906): two of the experts a token, and Mixtral's
load-balancing loss on the generative rows. Two CPU cores take about eight
minutes:

  python -m grit_jax.train --config=configs/quickstart_moe.py \
    --workdir=runs/quickstart_moe
"""

import importlib.util
import pathlib

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the quickstart's configuration, with experts."""
  path = pathlib.Path(__file__).with_name('quickstart.py')
  spec = importlib.util.spec_from_file_location('quickstart', path)
  quickstart = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(quickstart)
  config = quickstart.get_config()
  config.model.num_experts = 8
  config.model.mlp_dim = 256
  return config
