"""Does joint training cost anything? Unified against both specialists.

  pip install -e .
  python benchmarks/joint_vs_single.py --folder=/tmp/joint --output=joint.json

The paper's central claim (arXiv 2402.09906, tables 1 and 2) at the scale of
`--scale`: `cpu` takes about 40 minutes on two cores, and `h200` is for one such
GPU. On all of the installed Python code, held out by package, it trains

- a base model: plain text, generative objective, once. The paper's runs start
  from a pretrained model as well, and a common start leaves the runs of a seed
  apart in their objective alone;
- from it `unified`, `embedding only` and `generative only`, several seeds each.
  A seed decides the order of the data and the negatives. The runs of one seed
  see the same batches: a specialist the pairs, or the conversations, of the
  unified run, in as many steps;
- from it the unified run with one thing changed (`VARIANTS`).

Each run is `grit_jax.train.train` in a workdir of its own. Started again with
the same folder, the benchmark goes on, and repeats no run that has ended. It
writes tables and a figure beside them: the mean over seeds and the standard
deviation, and for the differences those of each seed's difference.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import code_corpus
import jax
import matplotlib
from absl import app, flags
from etils import epath
from matplotlib.figure import Figure

from grit_jax import config as configuration
from grit_jax import train
from grit_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvaluationConfig,
  MemoryConfig,
  ModelConfig,
  ObjectiveConfig,
  OptimizerConfig,
)
from grit_jax.logs import quiet_libraries
from grit_jax.models import presets

# The core, which runs first and with more seeds; then one change of it each.
CORE = {
  'unified': {},
  'embedding only': {'objective.mode': 'embedding'},
  'generative only': {'objective.mode': 'generative'},
}
VARIANTS = {
  'cccc, weighted mean': {
    'model.attention': 'cccc',
    'model.pooling': 'weightedmean',
  },
  'cccc, last token': {
    'model.attention': 'cccc',
    'model.pooling': 'lasttoken',
  },
  'token loss': {'objective.generative_reduction': 'token'},
  'sample loss': {'objective.generative_reduction': 'sample'},
  'generative weight 0.3': {'objective.generative_weight': 0.3},
  'generative weight 3': {'objective.generative_weight': 3.0},
  'negatives of all sets': {'data.mixing': 'all'},
  # As much data: half or twice as many steps.
  'batches halved': {'batches': 0.5},
  'batches doubled': {'batches': 2},
}
METRICS = {
  'recall_at_10': 'recall@10',
  'ndcg_at_10': 'nDCG@10',
  'generative_loss': 'generative loss',
}
# What unified is compared with in each metric.
SPECIALISTS = {
  'recall_at_10': 'embedding only',
  'ndcg_at_10': 'embedding only',
  'generative_loss': 'generative only',
}
PAIRS = ('functions', 'methods', 'summaries')


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of the corpus, the model and the runs.

  Attributes:
    per_package: functions of a package at most, in train and in test.
    packages: at most; 0: all.
    model: its architecture.
    tokenizer_pieces: of the tokenizer, trained on the plain text.
    text_tokens: of a query and of a passage at most.
    row_tokens: of a row, and of a conversation at most.
    embedding_batch: pairs a step.
    generative_batch: conversations a step.
    pretraining_batch: plain texts a step of the base model.
    pretraining_steps: of the base model.
    pretraining_rate: its learning rate.
    steps: of each run.
    learning_rate: of each run.
    seeds: of the core, and of the variants.
  """

  per_package: tuple[int, int]
  packages: int
  model: ModelConfig
  tokenizer_pieces: int
  text_tokens: int
  row_tokens: int
  embedding_batch: int
  generative_batch: int
  pretraining_batch: int
  pretraining_steps: int
  pretraining_rate: float
  steps: int
  learning_rate: float
  seeds: tuple[int, int]


SCALES = {
  # To test this script.
  'tiny': Scale(
    per_package=(30, 30),
    packages=40,
    model=dataclasses.replace(presets.tiny(), vocab_size=0),
    tokenizer_pieces=400,
    text_tokens=96,
    row_tokens=192,
    embedding_batch=8,
    generative_batch=8,
    pretraining_batch=8,
    pretraining_steps=2,
    pretraining_rate=1e-3,
    steps=2,
    learning_rate=1e-3,
    seeds=(2, 1),
  ),
  'cpu': Scale(
    per_package=(250, 60),
    packages=0,
    model=dataclasses.replace(
      presets.small(), embed_dim=128, head_dim=32, mlp_dim=384
    ),
    tokenizer_pieces=4096,
    text_tokens=64,
    row_tokens=160,
    embedding_batch=32,
    generative_batch=16,
    pretraining_batch=32,
    pretraining_steps=300,
    pretraining_rate=3e-3,
    steps=110,
    learning_rate=2e-3,
    seeds=(3, 2),
  ),
  'h200': Scale(
    per_package=(4000, 200),
    packages=0,
    model=dataclasses.replace(
      presets.small(), embed_dim=1024, num_layers=12, num_heads=16,
      num_kv_heads=4, mlp_dim=2816, dtype='bfloat16',
    ),
    tokenizer_pieces=16384,
    text_tokens=256,
    row_tokens=512,
    embedding_batch=512,
    generative_batch=128,
    pretraining_batch=512,
    pretraining_steps=2000,
    pretraining_rate=6e-4,
    steps=400,
    learning_rate=1e-4,
    seeds=(5, 3),
  ),
}  # fmt: skip

_FOLDER = flags.DEFINE_string('folder', None, 'Where everything is kept.')
_SCALE = flags.DEFINE_enum('scale', 'cpu', sorted(SCALES), 'Sizes of the runs.')
_OUTPUT = flags.DEFINE_string(
  'output', '', 'A JSON file; empty: `results.json` in the folder.'
)


def make_base_config(scale: Scale, folder: pathlib.Path) -> Config:
  """Returns the configuration of the base model's run."""
  return Config(
    model=scale.model,
    objective=ObjectiveConfig(mode='generative', generative_reduction='token'),
    data=DataConfig(
      paths='tfds:code_plain',
      tokenizer_pieces=scale.tokenizer_pieces,
      cache_dir=str(folder / 'corpus'),
      generative_batch=scale.pretraining_batch,
      max_query_tokens=scale.text_tokens,
      max_passage_tokens=scale.text_tokens,
      max_generative_tokens=scale.row_tokens,
      row_length=scale.row_tokens,
      max_segments=32,
      row_buckets=1,
    ),
    optimizer=OptimizerConfig(
      learning_rate=scale.pretraining_rate,
      warmup_fraction=0.05,
      schedule='cosine',
    ),
    memory=MemoryConfig(remat='none'),
    checkpoint=CheckpointConfig(every_steps=100, keep=1),
    evaluation=EvaluationConfig(enabled=False),
    steps=scale.pretraining_steps,
  )


def make_config(
  scale: Scale, folder: pathlib.Path, changes: dict[str, Any], seed: int
) -> Config:
  """Returns the configuration of a run: the recipe's, with changes."""
  base = make_base_config(scale, folder)
  share = changes.get('batches', 1)
  names = ', '.join(f'tfds:code_{name}' for name in (*PAIRS, 'conversations'))
  config = dataclasses.replace(
    base,
    model=dataclasses.replace(presets.of_init_from(), dtype=scale.model.dtype),
    objective=ObjectiveConfig(mixed_groups=4),
    data=dataclasses.replace(
      base.data,
      paths=names,
      embedding_batch=int(scale.embedding_batch * share),
      generative_batch=int(scale.generative_batch * share),
      mixing='none',
      row_buckets=2,
    ),
    optimizer=dataclasses.replace(
      base.optimizer, learning_rate=scale.learning_rate
    ),
    evaluation=EvaluationConfig(
      max_queries=2000, max_conversations=500, rows=64
    ),
    init_from=str(folder / 'base'),
    steps=int(scale.steps / share),
    seed=seed,
  )
  values = configuration.to_config_dict(config)
  for key, value in changes.items():
    if key != 'batches':
      group, name = key.split('.')
      values[group][name] = value
  return configuration.resolve(values)


def plan_runs(scale: Scale) -> list[tuple[str, dict[str, Any], int]]:
  """Returns the runs in their order: name, changes and seed."""
  return [
    (name, changes, seed)
    for variants, seeds in zip((CORE, VARIANTS), scale.seeds, strict=True)
    for seed in range(seeds)
    for name, changes in variants.items()
  ]


def check_settings(scale: Scale, folder: pathlib.Path) -> None:
  """Ends if the folder is of other settings; else notes these in it."""
  path = folder / 'settings.json'
  settings = {
    'scale': dataclasses.asdict(scale), 'variants': CORE | VARIANTS
  }  # fmt: skip
  text = json.dumps(settings, indent=2)
  if path.exists() and path.read_text() != text:
    sys.exit(f'{path} is of other settings. Take another folder.')
  path.write_text(text)


def make_corpus(scale: Scale, folder: pathlib.Path) -> dict[str, Any]:
  """Returns the sizes of the corpus, which is written if it is not there."""
  path = folder / 'corpus.json'
  if not path.exists():
    sizes = code_corpus.write_corpus(
      folder / 'corpus' / 'tfds',
      dict(zip(code_corpus.SPLITS, scale.per_package, strict=True)),
      scale.packages,
    )
    path.write_text(json.dumps(sizes, indent=2))
  return json.loads(path.read_text())


def run_once(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a run's evaluation found; it runs unless it has ended."""
  path = workdir / 'ended.json'
  if not path.exists():
    start = time.perf_counter()
    results = train.train(config, epath.Path(workdir))
    results['seconds'] = time.perf_counter() - start
    path.write_text(json.dumps(results, indent=2))
    # Each run has functions of its own, which no other uses again.
    jax.clear_caches()
  return json.loads(path.read_text())


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns mean and deviation of variants and of differences.

  Args:
    runs: each with `variant`, `seed`, `before` and `after`.

  Returns:
    `variants`: for each a metric's values; and `differences`: those of unified
    less the specialist's, seed by seed. Both as `describe` gives them.
  """
  found: dict[str, dict[str, dict[int, float]]] = {}
  for run in runs:
    for metric in METRICS:
      if metric in run['after']:
        values = found.setdefault(run['variant'], {}).setdefault(metric, {})
        values[run['seed']] = run['after'][metric]
  differences = {}
  for metric, specialist in SPECIALISTS.items():
    ours = found.get('unified', {}).get(metric, {})
    theirs = found.get(specialist, {}).get(metric, {})
    both = sorted(ours.keys() & theirs.keys())
    if both:
      differences[metric] = describe([ours[i] - theirs[i] for i in both])
  variants = {
    variant: {
      metric: describe(list(values.values()))
      for metric, values in metrics.items()
    }
    for variant, metrics in found.items()
  }
  return {'variants': variants, 'differences': differences}


def describe(values: list[float]) -> dict[str, Any]:
  """Returns mean, standard deviation (None of one value) and the values."""
  deviation = statistics.stdev(values) if len(values) > 1 else None
  return {
    'mean': statistics.fmean(values), 'deviation': deviation, 'values': values
  }  # fmt: skip


def make_tables(results: dict[str, Any]) -> str:
  """Returns the results as two tables in Markdown."""
  lines = [
    f'| run | seeds | {" | ".join(METRICS.values())} |',
    f'|---|---|{"---|" * len(METRICS)}',
  ]
  for name, figures in results['baselines'].items():
    cells = [
      f'{figures[metric]:.4f}' if metric in figures else ''
      for metric in METRICS
    ]
    lines.append(f'| {name} | | {" | ".join(cells)} |')
  for variant, metrics in results['variants'].items():
    seeds = max(len(one['values']) for one in metrics.values())
    cells = [_cell(metrics.get(metric)) for metric in METRICS]
    lines.append(f'| {variant} | {seeds} | {" | ".join(cells)} |')
  lines += ['', '| unified less | metric | difference | by seed |']
  lines += ['|---|---|---|---|']
  for metric, found in results['differences'].items():
    values = ', '.join(f'{value:+.4f}' for value in found['values'])
    lines.append(
      f'| {SPECIALISTS[metric]} | {METRICS[metric]} | {_cell(found, "+")} '
      f'| {values} |'
    )
  return '\n'.join(lines) + '\n'


def _cell(found: dict[str, Any] | None, sign: str = '') -> str:
  if found is None:
    return ''
  spread = found['deviation']
  return f'{found["mean"]:{sign}.4f}' + (
    '' if spread is None else f' ± {spread:.4f}'
  )


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws each variant's metrics; bars and bands are standard deviations."""
  shown = ('recall_at_10', 'generative_loss')
  names = list(results['variants'])
  figure = Figure(figsize=(8, 1 + 0.28 * len(names)), layout='constrained')
  for axes, metric in zip(
    figure.subplots(1, 2, sharey=True), shown, strict=True
  ):
    unified = results['variants']['unified'][metric]
    spread = unified['deviation'] or 0
    axes.axvspan(
      unified['mean'] - spread, unified['mean'] + spread, color='C0', alpha=0.15
    )
    for place, name in enumerate(names):
      found = results['variants'][name].get(metric)
      if found is None:
        continue
      axes.errorbar(
        found['mean'], place, xerr=found['deviation'], fmt='o', capsize=3,
        color='C0' if name in CORE else 'C7', markersize=4,
      )  # fmt: skip
    axes.set_title(f'held-out {METRICS[metric]}', fontsize=10)
    axes.grid(axis='x', alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_yticks(range(len(names)), names)
  axes.invert_yaxis()
  figure.savefig(path, dpi=100)


def main(argv: list[str]) -> None:
  """Runs what has not run yet; writes tables and figure after each run."""
  del argv
  quiet_libraries()
  matplotlib.use('agg')
  scale = SCALES[_SCALE.value]
  folder = pathlib.Path(_FOLDER.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  check_settings(scale, folder)
  # Runs that differ in their seed alone are mostly the same programs.
  jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
  results: dict[str, Any] = {
    'scale': _SCALE.value, 'corpus': make_corpus(scale, folder), 'runs': []
  }  # fmt: skip
  run_once(make_base_config(scale, folder), folder / 'base')
  output = pathlib.Path(_OUTPUT.value or folder / 'results.json')
  planned = plan_runs(scale)
  for number, (variant, changes, seed) in enumerate(planned, 1):
    print(f'Run {number} of {len(planned)}: {variant}, seed {seed}', flush=True)
    name = f'{variant.replace(", ", "_").replace(" ", "_")}-{seed}'
    found = run_once(make_config(scale, folder, changes, seed), folder / name)
    results['runs'].append({'variant': variant, 'seed': seed, **found})
    if number == 1:
      results['baselines'] = {
        'TF-IDF': found['tfidf'], 'base model': found['before']
      }  # fmt: skip
    results |= summarise(results['runs'])
    output.write_text(json.dumps(results, indent=2))
    output.with_suffix('.md').write_text(make_tables(results))
    draw(results, output.with_suffix('.png'))
  print(make_tables(results))


if __name__ == '__main__':
  flags.mark_flags_as_required(['folder'])
  app.run(main)
