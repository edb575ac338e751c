"""GRIT from any pretrained decoder, on data of one's own.

The architecture, the weights and the tokenizer are those of `init_from`: a
Hugging Face folder of a Mistral or Llama, a checkpoint, or a run's workdir.

  python -m grit_jax.train --config=configs/finetune.py \
    --config.init_from=FOLDER --config.data.paths=FOLDER_OF_JSONL \
    --workdir=runs/finetune

The settings are those of GritLM-7B (arXiv 2402.09906, section 3), but for the
batch, which is an eighth of its 2048 pairs and 256 conversations: set
`data.embedding_batch`, `data.generative_batch` and `steps` to what the data and
the machine are worth, and `memory.chunk_rows` if the batch does not fit.
"""

import ml_collections

from grit_jax import config as configuration
from grit_jax.config import Config, DataConfig, ObjectiveConfig
from grit_jax.models import presets


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration that flags override."""
  return configuration.to_config_dict(
    Config(
      model=presets.of_init_from(),
      objective=ObjectiveConfig(generative_reduction='mixed', mixed_groups=1),
      data=DataConfig(embedding_batch=256, generative_batch=32),
    )
  )
