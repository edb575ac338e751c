"""What the runs found: means over seeds, differences, tables and a figure."""

import pathlib
import statistics
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

UNIFIED = 'unified'
METRICS = {
  'recall_at_10': 'recall@10',
  'ndcg_at_10': 'nDCG@10',
  'generative_loss': 'generative loss',
}
DRAWN = ('recall_at_10', 'generative_loss')

# Of a metric: its mean, its standard deviation (None of one seed), its values.
Figures = dict[str, dict[str, Any]]


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, Figures]]:
  """Summarises the runs of several seeds.

  Args:
    runs: each with its `variant`, `seed` and what it has `after` training, and
      `before`, as in `evaluation.json`.

  Returns:
    `before`: TF-IDF, and the unified runs before they train. `variants`: after
    training. `unified_less`: the unified run's metrics less those of a variant,
    seed by seed.
  """
  found: dict[str, dict[str, dict[int, float]]] = {}
  for run in runs:
    for metric in METRICS:
      if metric in run['after']:
        of_variant = found.setdefault(run['variant'], {})
        of_variant.setdefault(metric, {})[run['seed']] = run['after'][metric]
  untrained = [run['before'] for run in runs if run['variant'] == UNIFIED]
  before: dict[str, Figures] = {}
  for name, rows in (('TF-IDF', [runs[0]['tfidf']]), ('untrained', untrained)):
    before[name] = {
      metric: describe([row[metric] for row in rows])
      for metric in METRICS
      if rows and metric in rows[0]
    }
  unified_less: dict[str, Figures] = {}
  for variant, metrics in found.items():
    for metric, values in metrics.items():
      ours = found.get(UNIFIED, {}).get(metric, {})
      both = sorted(ours.keys() & values.keys())
      if both and variant != UNIFIED:
        of_variant = unified_less.setdefault(variant, {})
        of_variant[metric] = describe([ours[i] - values[i] for i in both])
  variants = {
    variant: {
      metric: describe(list(values.values()))
      for metric, values in metrics.items()
    }
    for variant, metrics in found.items()
  }
  return {
    'before': before, 'variants': variants, 'unified_less': unified_less
  }  # fmt: skip


def describe(values: list[float]) -> dict[str, Any]:
  """Returns the mean, the standard deviation, and the values."""
  deviation = statistics.stdev(values) if len(values) > 1 else None
  return {
    'mean': statistics.fmean(values), 'deviation': deviation, 'values': values
  }  # fmt: skip


def make_tables(results: dict[str, dict[str, Figures]]) -> str:
  """Returns two tables in Markdown: the runs, and what unified differs by."""
  return '\n'.join(
    [
      *_table('run', results['before'] | results['variants'], ''),
      '',
      *_table('unified less', results['unified_less'], '+'),
      '',
    ]
  )


def _table(title: str, rows: dict[str, Figures], sign: str) -> list[str]:
  lines = [
    f'| {title} | seeds | {" | ".join(METRICS.values())} |',
    f'|---|---|{"---|" * len(METRICS)}',
  ]
  for name, figures in rows.items():
    seeds = max((len(one['values']) for one in figures.values()), default=0)
    cells = [_cell(figures.get(metric), sign) for metric in METRICS]
    lines.append(f'| {name} | {seeds} | {" | ".join(cells)} |')
  return lines


def _cell(found: dict[str, Any] | None, sign: str) -> str:
  if found is None:
    return ''
  spread = found['deviation']
  text = f'{found["mean"]:{sign}.3f}'
  return text if spread is None else f'{text} ± {spread:.3f}'


def draw(results: dict[str, dict[str, Figures]], path: pathlib.Path) -> None:
  """Draws the runs, a row each; bars and the band are standard deviations."""
  variants = results['variants']
  figure = Figure(figsize=(8, 1 + 0.27 * len(variants)), layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(DRAWN), sharey=True)
  for axes, metric in zip(panels, DRAWN, strict=True):
    ours = variants.get(UNIFIED, {}).get(metric)
    if ours is not None and ours['deviation'] is not None:
      low, high = (ours['mean'] + s * ours['deviation'] for s in (-1, 1))
      axes.axvspan(low, high, color='C0', alpha=0.15, linewidth=0)
    for place, figures in enumerate(variants.values()):
      if metric in figures:
        found = figures[metric]
        axes.errorbar(
          found['mean'], place, xerr=found['deviation'], fmt='o', capsize=3,
          markersize=4, color='C0' if found is ours else 'C7',
        )  # fmt: skip
    axes.set_title(f'held-out {METRICS[metric]}', loc='left', fontsize=10)
    axes.set_yticks(range(len(variants)), list(variants))
    axes.grid(axis='x', alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
  # The first at the top.
  panels[0].set_ylim(len(variants) - 0.5, -0.5)
  figure.savefig(path, dpi=100, format='png')
