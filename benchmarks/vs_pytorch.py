"""Races the train step against PyTorch, on the same texts and weights.

  pip install -e '.[test]'
  python benchmarks/vs_pytorch.py --preset=small --output=vs_pytorch.json

On one side is what `python -m grit_jax.train` runs: the pipeline with its
packed rows, and the train step. On the other is the reference's step, written
for PyTorch as well as we can (see `race/pytorch_side.py`), as it is and under
`torch.compile`, which on a CPU needs a C++ compiler. Both start from weights
that our exporter has written and take the same texts in the same batches; their
losses are compared before anything is timed.

Each side is a process of its own, so that its peak of memory is its own. They
take turns: a turn goes once through the workload's steps, and the first one,
which compiles, is not counted. Two workloads: `mix`, with the recipe's lengths,
and `equal`, where a row holds one text and packing cannot help. Tokens a second
count the tokens of texts alone, which are the same on both sides. Bare matrix
products at the shapes of the step show what either framework could reach.

`--preset=gpu` is the width of Mistral-7B at a depth that fits one GPU of 80 GB;
there a side's process ends with its turn, and the gradient is timed by itself
too.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version

import numpy as np
from absl import app, flags
from race import corpus
from race.turns import Side

from grit_jax.config import (
  Config,
  DataConfig,
  EvaluationConfig,
  MemoryConfig,
  ModelConfig,
  ObjectiveConfig,
  OptimizerConfig,
)
from grit_jax.models import presets

RACE = pathlib.Path(__file__).parent / 'race'
WORKLOADS = ('mix', 'equal')
# Shapes that a run's steps are padded to.
ROW_BUCKETS = 8
# Steps of a turn of `equal`, whose batches are all of one size.
EQUAL_STEPS = 4
# Both sides compute in float32 (in bfloat16 on a GPU), in another order, and
# the temperature of 0.02 multiplies what that does to a similarity by 50.
LOSS_TOLERANCE = {'float32': 1e-3, 'bfloat16': 5e-2}


@dataclasses.dataclass(frozen=True)
class Preset:
  """The sizes of a race.

  Attributes:
    model: its vocabulary is the tokenizer's.
    pieces: of the tokenizer.
    pairs: a step, each with a hard negative.
    conversations: a step.
    max_tokens: of a text; a packed row has as many.
    equal_tokens: of every text of the workload `equal`.
    memory: of our side.
    recompute: whether PyTorch's side computes layers again for the gradient.
    alone: whether a side needs the device's memory for itself, so that its
      process ends with its turn.
    backward: whether the gradient is timed by itself too.
  """

  model: ModelConfig
  pieces: int
  pairs: int
  conversations: int
  max_tokens: int
  equal_tokens: int
  memory: MemoryConfig = MemoryConfig(remat='none')
  recompute: bool = False
  alone: bool = False
  backward: bool = False


PRESETS = {
  'tiny': Preset(
    model=dataclasses.replace(presets.tiny(), vocab_size=0),
    pieces=600,
    pairs=4,
    conversations=2,
    max_tokens=128,
    equal_tokens=64,
  ),
  'small': Preset(
    model=presets.small(),
    pieces=4096,
    pairs=32,
    conversations=4,
    max_tokens=2048,
    equal_tokens=256,
  ),
  'gpu': Preset(
    model=dataclasses.replace(presets.mistral_7b(), vocab_size=0, num_layers=4),
    pieces=32000,
    pairs=64,
    conversations=8,
    max_tokens=2048,
    equal_tokens=2048,
    # The scores of a row of 2048 tokens are 0.5 GB a layer.
    memory=MemoryConfig(remat='full', chunk_rows=8),
    recompute=True,
    alone=True,
    backward=True,
  ),
}

_PRESET = flags.DEFINE_enum('preset', 'small', list(PRESETS), 'Sizes.')
_PAIRS = flags.DEFINE_integer('pairs', 0, 'Pairs a step; 0: as the preset.')
_CONVERSATIONS = flags.DEFINE_integer(
  'conversations', 0, 'Conversations a step; 0: as the preset.'
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 0, 'Tokens of a text and of a row; 0: as the preset.'
)
_LAYERS = flags.DEFINE_integer('layers', 0, 'Layers; 0: as the preset.')
_STEPS = flags.DEFINE_integer(
  'steps', corpus.EPOCH, 'Steps of a turn of `mix`, the first of an epoch.'
)
_TURNS = flags.DEFINE_integer('turns', 3, 'Turns that are timed.')
_WORKLOADS = flags.DEFINE_multi_enum(
  'workload', list(WORKLOADS), WORKLOADS, 'Once for each workload.'
)
_COMPILED = flags.DEFINE_bool(
  'compiled', True, 'Whether PyTorch races under torch.compile too.'
)
_FOLDER = flags.DEFINE_string(
  'folder', '', 'Where data and weights are kept; empty: nowhere.'
)
_OUTPUT = flags.DEFINE_string('output', '', 'A JSON file for the figures.')


def make_preset() -> Preset:
  """Returns the sizes that the flags ask for."""
  preset = PRESETS[_PRESET.value]
  changes = {
    'pairs': _PAIRS.value,
    'conversations': _CONVERSATIONS.value,
    'max_tokens': _MAX_TOKENS.value,
  }
  changes = {name: value for name, value in changes.items() if value}
  if _LAYERS.value:
    changes['model'] = dataclasses.replace(
      preset.model, num_layers=_LAYERS.value
    )
  return dataclasses.replace(preset, **changes)


def longest_text(preset: Preset, workload: str) -> int:
  """Returns the tokens that texts are cut at, and that a row has."""
  return preset.max_tokens if workload == 'mix' else preset.equal_tokens


def make_config(preset: Preset, workload: str, folder: pathlib.Path) -> Config:
  """Returns the configuration of our side, which PyTorch's side reads too."""
  longest = longest_text(preset, workload)
  config = Config(
    model=preset.model,
    # The reference's: the mean over the tokens of its batch.
    objective=ObjectiveConfig(generative_reduction='token'),
    data=DataConfig(
      paths=str(folder / 'records'),
      tokenizer_pieces=preset.pieces,
      embedding_batch=preset.pairs,
      generative_batch=preset.conversations,
      mixing='none',
      max_query_tokens=min(256, longest) if workload == 'mix' else longest,
      max_passage_tokens=longest,
      max_generative_tokens=longest,
      row_length=longest,
      row_buckets=ROW_BUCKETS,
    ),
    optimizer=OptimizerConfig(schedule='constant', warmup_fraction=0.0),
    memory=preset.memory,
    evaluation=EvaluationConfig(enabled=False, held_out_fraction=0.0),
    steps=_STEPS.value if workload == 'mix' else EQUAL_STEPS,
  )
  config.validate()
  return config


class Sides:
  """The sides' processes: all at once, or one at a time."""

  def __init__(self, folder: pathlib.Path, preset: Preset):
    """Starts none yet; `folder` is prepared."""
    recompute = 'recompute' if preset.recompute else 'keep'
    self._arguments = {
      'grit_jax': ('grit_jax_side.py', 'race', str(folder)),
      'pytorch': ('pytorch_side.py', str(folder), 'eager', recompute),
      'pytorch compiled': (
        'pytorch_side.py', str(folder), 'compiled', recompute
      ),
    }  # fmt: skip
    self.names = list(self._arguments)
    if not _COMPILED.value:
      self.names.remove('pytorch compiled')
    elif shutil.which('g++') is None:
      print('There is no C++ compiler, g++: torch.compile is left out.')
      self.names.remove('pytorch compiled')
    self._alone = preset.alone
    self._running: dict[str, Side] = {}
    # The first turn of each side, which is not timed.
    self.first: dict[tuple[str, bool], dict] = {}

  def run(self, name: str, backward_only: bool = False) -> dict:
    """Has a side take a turn; where it has to compile, a second one."""
    side = self._side(name)
    if self._alone or (name, backward_only) not in self.first:
      first = side('run', backward_only=backward_only)
      self.first.setdefault((name, backward_only), first)
    result = side('run', backward_only=backward_only)
    self._end_turn()
    return result

  def products(self, name: str, shapes: list) -> list[dict[str, float]]:
    """Has a side measure bare products."""
    found = self._side(name)('products', shapes=shapes)
    self._end_turn()
    return found

  def _side(self, name: str) -> Side:
    if name not in self._running:
      script, *arguments = self._arguments[name]
      self._running[name] = Side(RACE / script, *arguments)
    return self._running[name]

  def _end_turn(self) -> None:
    if self._alone:
      self.close()

  def close(self) -> None:
    """Ends all processes."""
    for side in self._running.values():
      side.close()
    self._running = {}


def check_same_work(sides: Sides, tolerance: float) -> None:
  """Compares what the sides have computed in their first turns.

  Raises:
    RuntimeError: a step's losses or a turn's tokens differ.
  """
  ours, *others = (sides.first[name, False] for name in sides.names)
  for name, other in zip(sides.names[1:], others, strict=True):
    if ours['tokens'] != other['tokens']:
      raise RuntimeError(
        f'{name} counts {other["tokens"]} tokens of texts, and grit_jax '
        f'{ours["tokens"]}.'
      )
    pairs = zip(ours['losses'], other['losses'], strict=True)
    for step, losses in enumerate(pairs, start=1):
      for a, b in zip(*losses, strict=True):
        if abs(a - b) > tolerance * abs(b):
          raise RuntimeError(
            f'Step {step}: the losses (embedding, generative) of grit_jax are '
            f'{losses[0]}, and those of {name} {losses[1]}: this is not the '
            'same work.'
          )


def product_shapes(model: ModelConfig, tokens: int) -> list:
  """Returns rows, inputs and outputs of the layers of the decoder."""
  width = model.num_heads * model.head_dim
  kv_width = model.num_kv_heads * model.head_dim
  return [
    (tokens, model.embed_dim, width),
    (tokens, model.embed_dim, kv_width),
    (tokens, model.embed_dim, model.mlp_dim),
    (tokens, model.mlp_dim, model.embed_dim),
  ]


def count_useful_flops(model: ModelConfig, texts: dict) -> float:
  """Counts the operations that a turn's texts need, forward and backward.

  The products of the layers for each token, of attention within each text
  (half of it where it is causal), and of the head for each token in the loss.
  Nothing for padding, for other texts of a row, or for what is recomputed.

  Args:
    model: with its vocabulary.
    texts: what `grit_jax_side.collect_texts` has written.
  """
  width = model.num_heads * model.head_dim
  kv_width = model.num_kv_heads * model.head_dim
  layer = model.embed_dim * (2 * width + 2 * kv_width + 3 * model.mlp_dim)
  lengths = texts['lengths'].astype(float)
  talks = texts['talk_lengths'].astype(float)
  linear = 2 * layer * (lengths.sum() + talks.sum())
  attention = 4 * width * ((lengths**2).sum() + (talks**2).sum() / 2)
  head = 2 * model.embed_dim * model.vocab_size * texts['talk_in_loss'].sum()
  return float(3 * (model.num_layers * (linear + attention) + head))


def race(preset: Preset, workload: str, folder: pathlib.Path) -> dict:
  """Runs one workload; returns its figures."""
  corpus.write_corpus(
    folder / 'records',
    workload,
    preset.pairs,
    preset.conversations,
    longest_text(preset, workload),
    preset.pieces,
  )
  config = make_config(preset, workload, folder)
  (folder / 'config.json').write_text(json.dumps(dataclasses.asdict(config)))
  subprocess.run(
    [sys.executable, RACE / 'grit_jax_side.py', 'prepare', folder], check=True
  )
  with np.load(folder / 'texts.npz') as arrays:
    texts = dict(arrays)
  model = dataclasses.replace(config.model, vocab_size=preset.pieces)
  tokens = int(texts['lengths'].sum() + texts['talk_lengths'].sum())
  shapes = product_shapes(model, tokens // config.steps)
  sides = Sides(folder, preset)
  turns = {name: [] for name in sides.names}
  gradients = {name: [] for name in sides.names if preset.backward}
  try:
    for turn in range(_TURNS.value):
      for name in sides.names:
        turns[name].append(sides.run(name))
      if turn == 0:
        check_same_work(sides, LOSS_TOLERANCE[model.dtype])
      for name in gradients:
        gradients[name].append(sides.run(name, backward_only=True))
    products = {
      name: sides.products(name, shapes) for name in ('grit_jax', 'pytorch')
    }
  finally:
    sides.close()
  fastest = max(
    rate
    for found in products.values()
    for row in found
    for rate in row.values()
  )
  return {
    'steps': config.steps,
    'useful_tokens': tokens,
    'useful_flops': count_useful_flops(model, texts),
    'product_shapes': shapes,
    'products': products,
    'ceiling': fastest,
    'losses': {
      name: sides.first[name, False]['losses'] for name in sides.names
    },
    'turns': turns,
    'gradients': gradients,
  }


def summarise(figures: dict) -> dict[str, dict[str, float]]:
  """Returns of each side what the table shows."""
  found = {}
  for name, turns in figures['turns'].items():
    seconds = [turn['seconds'] for turn in turns]
    ours = [turn['seconds'] for turn in figures['turns']['grit_jax']]
    ratios = [b / a for a, b in zip(ours, seconds, strict=True)]
    middle = statistics.median(seconds)
    cores = statistics.median(turn['core_seconds'] for turn in turns)
    found[name] = {
      'tokens_per_second': figures['useful_tokens'] / middle,
      # Turn by turn, so that what else the machine does weighs on both.
      'speedup_of_grit_jax': statistics.median(ratios),
      'speedup_least': min(ratios),
      'speedup_most': max(ratios),
      # Of one core; threads that wait for others count too.
      'tokens_per_core_second': figures['useful_tokens'] / cores,
      'computed_of_useful': turns[0]['computed'] / figures['useful_tokens'],
      'peak_mib': max(turn['peak_mib'] for turn in turns),
      'libraries_mib': turns[0]['libraries_mib'],
      'utilisation': figures['useful_flops'] / middle / figures['ceiling'],
    }
    if name in figures['gradients']:
      backward = [turn['seconds'] for turn in figures['gradients'][name]]
      found[name]['gradient_tokens_per_second'] = figures[
        'useful_tokens'
      ] / statistics.median(backward)
  return found


def print_table(workload: str, figures: dict) -> None:
  """Prints a workload's figures to be read."""
  print(f'\n{workload}: {figures["useful_tokens"]:,} tokens of texts a turn')
  print(
    f'{"":18}{"tokens/s":>10}{"grit_jax is":>13}{"(range)":>14}'
    f'{"a core":>9}{"computed/useful":>17}{"peak MiB":>10}{"libraries":>11}'
    f'{"of ceiling":>12}'
  )
  for name, row in figures['summary'].items():
    extent = f'{row["speedup_least"]:.2f}-{row["speedup_most"]:.2f}'
    print(
      f'{name:18}{row["tokens_per_second"]:10,.0f}'
      f'{row["speedup_of_grit_jax"]:12.2f}x{extent:>14}'
      f'{row["tokens_per_core_second"]:9,.0f}'
      f'{row["computed_of_useful"]:17.2f}{row["peak_mib"]:10,.0f}'
      f'{row["libraries_mib"]:11,.0f}{row["utilisation"]:12.1%}'
    )
    if 'gradient_tokens_per_second' in row:
      print(
        f'{"  without update":18}{row["gradient_tokens_per_second"]:10,.0f}'
      )
  print('Bare products, in GFLOP/s of grit_jax / pytorch:')
  rows = zip(
    figures['product_shapes'], *figures['products'].values(), strict=True
  )
  for shape, ours, theirs in rows:
    rates = '   '.join(
      f'{kind} {ours[kind] / 1e9:7,.0f} / {theirs[kind] / 1e9:7,.0f}'
      for kind in ours
    )
    print(f'  {" x ".join(map(str, shape)):20}{rates}')


def main(argv: list[str]) -> None:
  """Races, and prints the figures."""
  del argv
  for needed in ('torch', 'transformers'):
    if importlib.util.find_spec(needed) is None:
      sys.exit(
        f'{needed} is not installed: there is nothing to race against. pip '
        "install -e '.[test]' on Python 3.11 brings it."
      )
  preset = make_preset()
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(_FOLDER.value or temporary)
    workloads = {}
    content = {
      'preset': dataclasses.asdict(preset),
      'cores': len(os.sched_getaffinity(0)),
      'versions': {name: version(name) for name in ('jax', 'torch')},
      'workloads': workloads,
    }
    for workload in dict.fromkeys(_WORKLOADS.value):
      figures = race(preset, workload, root / workload)
      workloads[workload] = figures | {'summary': summarise(figures)}
      print_table(workload, workloads[workload])
      sys.stdout.flush()
      # A workload takes many minutes: what is done is not lost with the next.
      if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=2))


if __name__ == '__main__':
  app.run(main)
