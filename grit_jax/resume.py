"""Whether a run that goes on is the one that its checkpoint is of.

What counts is content: a file may be somewhere else, but what it holds must be
what the run began with.
"""

import dataclasses
import json
from typing import Any

from absl import logging

from grit_jax.checkpoint import Checkpoint
from grit_jax.config import Config
from grit_jax.data.preparation import Datasets
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.errors import ConfigError
from grit_jax.initial import open_initial

# Keys that may change between the starts of one run: they leave its batches,
# its weights and its schedule what they were. Groups stand for all they have.
_CHANGEABLE = (
  'mesh', 'memory', 'attention_kernel', 'checkpoint', 'evaluation', 'profile',
  'log_every', 'data.allow_changed',
  # Of these the content is compared.
  'data.paths', 'data.cache_dir', 'data.tokenizer', 'init_from',
)  # fmt: skip
# But for this one, which decides what is trained on.
_FIXED = 'evaluation.held_out_fraction'


def describe_run(
  initial: str, tokenizer: Tokenizer, datasets: Datasets
) -> dict[str, Any]:
  """Returns what a checkpoint keeps of a run, to be compared at its next start.

  Args:
    initial: The fingerprint of the model that it began with; empty: none.
    tokenizer: The run's.
    datasets: Those that it trains on.
  """
  return {
    'init_from': initial,
    'tokenizer': tokenizer.fingerprint,
    'data': [
      [dataset.name, dataset.fingerprint]
      for dataset in (*datasets['embedding'], *datasets['generative'])
    ],
  }


def check_same_config(config: Config, kept: Checkpoint) -> None:
  """Checks that a checkpoint's run has this configuration.

  Raises:
    ConfigError: it has another; the message names each key.
  """
  now = json.loads(json.dumps(dataclasses.asdict(config)))
  changed = [
    f'{key}: {before!r}, now {after!r}'
    for key, before, after in _differences(kept.read_config(), now)
    if not {key, key.split('.')[0]} & {*_CHANGEABLE} or key == _FIXED
  ]
  if changed:
    raise ConfigError(
      f'{kept.folder} is of a run with another configuration ('
      + '; '.join(changed)
      + '). Take another workdir.'
    )


def check_same_initial(config: Config, kept: Checkpoint) -> None:
  """Checks that a checkpoint's run began with this model, wherever it is now.

  A run needs it no more, so it may be gone. Adapters need theirs: `check_base`
  compares it.

  Raises:
    ConfigError: it began with another.
  """
  before, now = kept.read_config()['init_from'], config.init_from
  if before == now or config.lora.rank:
    return
  fingerprint = open_initial(now).fingerprint() if now else ''
  if fingerprint != kept.fingerprints['run']['init_from']:
    raise ConfigError(
      f'init_from={now!r}: {kept.folder} is of a run that began with another '
      f'model (init_from={before!r}). Take another workdir.'
    )


def check_same_tokenizer(tokenizer: Tokenizer, kept: Checkpoint) -> None:
  """Checks that a checkpoint's run has this tokenizer.

  Raises:
    ConfigError: it has another.
  """
  if tokenizer.fingerprint != kept.fingerprints['run']['tokenizer']:
    raise ConfigError(
      f'{kept.folder} is of a run with another tokenizer: its weights know '
      'other token ids. That one is kept in its folder tokenizer; or take '
      'another workdir.'
    )


def check_same_data(
  config: Config, run: dict[str, Any], kept: Checkpoint
) -> None:
  """Checks that a checkpoint's run has been trained on this data.

  Args:
    config: With `data.allow_changed` other data is reported alone.
    run: What `describe_run` returns now.
    kept: The checkpoint.

  Raises:
    ConfigError: it has other data, and may not.
  """
  before = [tuple(pair) for pair in kept.fingerprints['run']['data']]
  now = [tuple(pair) for pair in run['data']]
  if before == now:
    return
  names = sorted({name for name, _ in {*before} ^ {*now}})
  what = f'another content of {", ".join(names)}' if names else 'another order'
  if not config.data.allow_changed:
    raise ConfigError(
      f'data.paths={config.data.paths!r}: {kept.folder} is of a run with '
      f'{what}, so the batches would be others than those of that run. '
      'data.allow_changed=True goes on with the data as it is now, from the '
      'same step; or take another workdir.'
    )
  logging.warning(
    'The data has %s than at %s. The run goes on from its step, with batches '
    'planned from the data as it is now.', what, kept.folder,
  )  # fmt: skip


def _differences(
  before: dict[str, Any], after: dict[str, Any], prefix: str = ''
) -> list[tuple[str, Any, Any]]:
  """Returns the keys that differ, with their values before and after."""
  found = []
  for name in sorted({*before, *after}):
    old, new = before.get(name), after.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      found += _differences(old, new, f'{prefix}{name}.')
    elif old != new:
      found.append((prefix + name, old, new))
  return found
