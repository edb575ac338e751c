"""What a preparation tells of its data: a table, `report.json`, a picture."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grit_jax.data import records
from grit_jax.data.reports import Report, read_content
from grit_jax.data.sources import HELD_OUT, TRAIN
from grit_jax.files import write_json, writing

QUERIES, PASSAGES, CONVERSATIONS = 'queries', 'passages', 'conversations'

_QUANTILES = {'median': 0.5, '90%': 0.9, '99%': 0.99, 'longest': 1.0}
_BINS = 64
# More lines than this cannot be told apart; the largest data sets have names.
_NAMED = 10
# Records whose lengths are counted at once.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Summary:
  """What became of a source.

  Attributes:
    name: of the data set.
    kind: of its records.
    reports: of each split.
    lengths: for each kind of text the number of texts of each length, int64
      [longest + 1], all splits together.
  """

  name: str
  kind: str
  reports: dict[str, Report]
  lengths: dict[str, np.ndarray]

  @property
  def whole(self) -> Report:
    """The report of all splits."""
    whole = Report()
    for report in self.reports.values():
      whole.add(report)
    return whole


def summarize(folder: pathlib.Path) -> Summary:
  """Sums a tokenized data set up.

  Args:
    folder: its folder.

  Returns:
    The summary.
  """
  content = read_content(folder)
  reports = {
    split: Report(**fields['report'])
    for split, fields in content['splits'].items()
  }
  lengths: dict[str, np.ndarray] = {}
  for split, report in reports.items():
    if report.records:
      for name, counts in _count(folder, split, content['kind']).items():
        lengths[name] = _add(lengths.get(name, counts[:0]), counts)
  return Summary(content['name'], content['kind'], reports, lengths)


def _count(
  folder: pathlib.Path, split: str, kind: str
) -> dict[str, np.ndarray]:
  """Counts the texts of each length."""
  lengths = np.load(folder / f'{split}-lengths.npy', mmap_mode='r')
  if kind == records.GENERATIVE:
    return {CONVERSATIONS: _count_lengths(lengths)}
  offsets = np.load(folder / f'{split}-offsets.npy', mmap_mode='r')
  queries = np.zeros(0, np.int64)
  for start in range(0, len(offsets) - 1, _BLOCK):
    places = offsets[start : min(start + _BLOCK, len(offsets) - 1)]
    queries = _add(queries, np.bincount(lengths[places]))
  texts = _count_lengths(lengths)
  return {QUERIES: queries, PASSAGES: _add(texts, -queries)}


def _count_lengths(lengths: np.ndarray) -> np.ndarray:
  counts = np.zeros(0, np.int64)
  for start in range(0, len(lengths), _BLOCK):
    counts = _add(counts, np.bincount(lengths[start : start + _BLOCK]))
  return counts


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  size = max(len(a), len(b))
  return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))


def write(summaries: list[Summary], directory: pathlib.Path) -> None:
  """Writes `report.json` and `lengths.png`.

  Args:
    summaries: of the data sets.
    directory: where to.
  """
  content = [
    {
      'name': summary.name,
      'kind': summary.kind,
      'splits': {
        split: dataclasses.asdict(report)
        for split, report in summary.reports.items()
      },
      'lengths': {
        name: describe(counts) for name, counts in summary.lengths.items()
      },
    }
    for summary in summaries
  ]
  with writing(directory):
    write_json(directory / 'report.json', {'data_sets': content})
    plot(summaries, directory / 'lengths.png')


def describe(counts: np.ndarray) -> dict[str, float]:
  """Returns the number, mean and quantiles of lengths.

  Args:
    counts: how many have each length.
  """
  total = int(counts.sum())
  reached = np.cumsum(counts)
  mean = float(np.arange(len(counts)) @ counts) / total
  return {'count': total, 'mean': round(mean, 1)} | {
    name: int(np.searchsorted(reached, quantile * total))
    for name, quantile in _QUANTILES.items()
  }


def plot(summaries: list[Summary], path: pathlib.Path) -> None:
  """Draws the lengths of queries, passages and conversations.

  Args:
    summaries: of the data sets.
    path: of the picture.
  """
  kinds = [
    kind
    for kind in (QUERIES, PASSAGES, CONVERSATIONS)
    if any(kind in summary.lengths for summary in summaries)
  ]
  figure = Figure(figsize=(8, 2.6 * max(len(kinds), 1)), layout='constrained')
  FigureCanvasAgg(figure)
  rows = figure.subplots(max(len(kinds), 1), 1, squeeze=False)[:, 0]
  for axes, kind in zip(rows, kinds, strict=False):
    found = [summary for summary in summaries if kind in summary.lengths]
    found.sort(key=lambda summary: -summary.lengths[kind].sum())
    longest = max(len(summary.lengths[kind]) for summary in found)
    edges = np.linspace(0, longest, min(_BINS, longest) + 1)
    for number, summary in enumerate(found):
      counts = summary.lengths[kind]
      shares, _ = np.histogram(
        np.arange(len(counts)), edges, weights=counts / counts.sum()
      )
      label = summary.name if number < _NAMED else None
      axes.stairs(shares, edges, label=label, linewidth=1.2)
    axes.set_title(f'Tokens of {kind}', loc='left', fontsize=10)
    axes.set_ylabel('share of texts')
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
  rows[-1].set_xlabel('tokens')
  figure.savefig(path, dpi=150)


def tabulate(summaries: list[Summary]) -> str:
  """Returns a table to be read, and why records were left out.

  Args:
    summaries: of the data sets.
  """
  columns = (
    'data set', 'kind', 'records', 'held out', 'texts', 'tokens', 'cut texts',
    'cut tokens', 'dropped', 'skipped',
  )  # fmt: skip
  rows = [columns, *(_cells(summary) for summary in summaries)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if number < 2 else cell.rjust(width)
      for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append('  '.join(cells).rstrip())
  for summary in summaries:
    whole = summary.whole
    for verb, counts in ('dropped', whole.dropped), ('skipped', whole.skipped):
      for reason, count in counts.items():
        lines.append(f'{summary.name}: {verb} {count:,}: {reason}')
        lines += [f'  {fault}' for fault in whole.faults.get(reason, ())]
  return '\n'.join(lines)


def _cells(summary: Summary) -> tuple[str, ...]:
  whole = summary.whole
  numbers: list[Any] = [
    summary.reports[TRAIN].records,
    summary.reports[HELD_OUT].records,
    whole.texts,
    whole.tokens,
    whole.cut_texts,
    whole.cut_tokens,
    sum(whole.dropped.values()),
    sum(whole.skipped.values()),
  ]
  return (summary.name, summary.kind, *(f'{number:,}' for number in numbers))
