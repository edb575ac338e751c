"""The command; see the package."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from grit_jax import config as configuration
from grit_jax.aot import report
from grit_jax.aot.compiler import CompileError, Request, compile_step
from grit_jax.aot.program import Sizes
from grit_jax.aot.sweep import sweep
from grit_jax.aot.topologies import TopologyError, count_devices, find_chip
from grit_jax.config import Config, ConfigError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The configuration.')
_TOPOLOGY = flags.DEFINE_string('topology', None, 'Such as v5e:8x8.')
_SLICES = flags.DEFINE_integer('slices', 1, 'How many of it.', lower_bound=1)
_EMBEDDING = flags.DEFINE_integer(
  'embedding_rows',
  None,
  'Packed rows of embedding texts a step. By default a row for four pairs, '
  'which is about what the data of the paper take, rounded up to divide.',
  lower_bound=1,
)
_GENERATIVE = flags.DEFINE_integer(
  'generative_rows',
  None,
  'Packed rows of conversations a step. By default as many as conversations of '
  'the greatest length take, rounded up to divide.',
  lower_bound=1,
)
_FULL = flags.DEFINE_bool(
  'full', False, 'Generate code too: minutes, but certain that it compiles.'
)
_SWEEP = flags.DEFINE_bool('sweep', False, 'Try other executors and meshes.')
_OUTPUT = flags.DEFINE_string('output', '', 'A JSON file for the figures.')


def main(argv: Sequence[str]) -> None:
  """Compiles, and prints what the compiler says."""
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  try:
    request = make_request()
    if _SWEEP.value:
      found = sweep(request, lambda line: print(line, file=sys.stderr))
      print(report.describe_sweep(found))
      write(found)
      return
    figures = compile_step(request)
    figures['estimated_seconds'] = report.estimate_seconds(figures)
  except (CompileError, ConfigError, TopologyError) as error:
    sys.exit(f'grit_jax: error: {error}')
  print(report.describe(figures))
  write(figures)


def make_request() -> Request:
  """Reads the flags.

  Raises:
    ConfigError, TopologyError: a flag's value cannot be.
  """
  find_chip(_TOPOLOGY.value)
  values = _CONFIG.value
  # Neither is read: shapes alone are.
  values.data.paths = values.data.paths or 'unused'
  config = configuration.resolve(values)
  if not config.model.embed_dim:
    raise ConfigError(
      'model.embed_dim=0 takes the architecture from init_from, which is not '
      'read here: name the sizes, as configs/gritlm_7b.py does.'
    )
  if not config.model.vocab_size:
    model = dataclasses.replace(
      config.model, vocab_size=config.data.tokenizer_pieces
    )
    config = dataclasses.replace(config, model=model)
  sizes = Sizes(
    _EMBEDDING.value or _divisible(config.data.embedding_batch / 4),
    _GENERATIVE.value or _divisible(_worst_generative(config)),
  )
  return Request(config, _TOPOLOGY.value, _SLICES.value, sizes, _FULL.value)


def _worst_generative(config: Config) -> float:
  data = config.data
  return data.generative_batch * data.max_generative_tokens / data.row_length


def _divisible(rows: float) -> int:
  devices = _SLICES.value * count_devices(_TOPOLOGY.value)
  return math.ceil(rows / devices) * devices


def write(figures: dict | list) -> None:
  """Writes what `--output` names."""
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w') as file:
      json.dump(figures, file, indent=2)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'topology'])
  app.run(main)
