"""Metrics of a run: a file of JSON lines, TensorBoard, a bar, a picture.

A run that resumes goes on in the same `metrics.jsonl`, which then holds the
steps of a run that was never interrupted, each once.
"""

import contextlib
import io
import json
import math
import os
from typing import Any

import jax
import tqdm
from absl import logging
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grit_jax.files import is_local, write_file, writing

TOKENS_PER_SECOND = 'tokens_per_second'

# What `plot_losses` draws: key, title and unit.
PLOTS = (
  ('loss', 'Loss', 'weighted sum'),
  ('loss_rep', 'Embedding loss', 'nats per query'),
  ('loss_gen', 'Generative loss', 'nats per token'),
  ('evaluation/recall_at_10', 'Held-out recall@10', 'share of queries'),
  ('evaluation/generative_loss', 'Held-out generative loss', 'nats per token'),
  ('learning_rate', 'Learning rate', 'per step'),
)


class MetricsWriter:
  """Writes metrics, and shows the progress; a context manager.

  Of several processes the first alone writes. While it is open, other output
  goes through `tqdm.tqdm.write`, or it tears the progress bar.
  """

  def __init__(
    self, workdir: os.PathLike | str, start_step: int, total_steps: int
  ):
    """Opens the files, without what they have of later steps.

    Args:
      workdir: a folder, local or gs://.
      start_step: the checkpoint's that the run goes on from; 0: a new run.
      total_steps: of the run.
    """
    self._is_writer = jax.process_index() == 0
    self._step = start_step
    if not self._is_writer:
      return
    self._folder = folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'metrics.jsonl'
    if path.exists():
      _keep_until(path, start_step)
    self._file = open(path, 'a') if is_local(path) else _CloudFile(path)
    # Here: it imports PyTorch where there is one, which takes seconds.
    import tensorboardX

    _put_in_order(folder / 'tensorboard')
    self._tensorboard = tensorboardX.SummaryWriter(
      str(folder / 'tensorboard'),
      purge_step=start_step + 1 if start_step else 0,
    )
    self._bar = tqdm.tqdm(
      initial=start_step,
      total=total_steps,
      unit='step',
      dynamic_ncols=True,
      bar_format='step {n_fmt}/{total_fmt} |{bar}| {desc}{remaining} left',
    )

  def __enter__(self) -> 'MetricsWriter':
    """Returns itself."""
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    """Closes the files and the bar."""
    if not self._is_writer:
      return
    self._bar.close()
    # An error that is on its way says more than one of closing.
    with contextlib.suppress(OSError) if kind else writing(self._folder):
      self._tensorboard.close()
      self._file.close()

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes the metrics of a step, in the order of `values`.

    What is not finite is null in the file, as JSON has no number for it.
    """
    if not self._is_writer:
      return
    numbers = {key: float(value) for key, value in values.items()}
    line = {'step': int(step)} | {
      key: number if math.isfinite(number) else None
      for key, number in numbers.items()
    }
    with writing(self._folder):
      self._file.write(json.dumps(line) + '\n')
      self._file.flush()
      for key, number in numbers.items():
        self._tensorboard.add_scalar(key, number, step)
    if description := _describe(numbers):
      self._bar.set_description_str(description, refresh=False)
    self.advance(step)

  def write_evaluation(self, step: int, values: dict[str, float]) -> None:
    """Writes the figures of an evaluation, as metrics of their own line."""
    self.write(
      step, {f'evaluation/{name}': value for name, value in values.items()}
    )

  def advance(self, step: int) -> None:
    """Moves the bar to a step."""
    if self._is_writer:
      self._bar.update(step - self._step)
      self._step = step


def _describe(numbers: dict[str, float]) -> str:
  parts = [
    f'{key}={numbers[key]:.4f}'
    for key in ('loss_rep', 'loss_gen')
    if key in numbers
  ]
  if TOKENS_PER_SECOND in numbers:
    parts.append(f'{numbers[TOKENS_PER_SECOND]:,.0f} tokens/s')
  return ''.join(f'{part}, ' for part in parts)


class _CloudFile(io.StringIO):
  """A text file on gs://, which cannot append: flushing writes all of it."""

  def __init__(self, path: epath.Path):
    """Goes on at the end of the file, if there is one."""
    super().__init__()
    self._path = path
    if path.exists():
      self.write(path.read_text())

  def flush(self) -> None:
    """Writes the file anew; at no time is it half written."""
    self._path.write_text(self.getvalue())


def _put_in_order(folder: epath.Path) -> None:
  """Renames the event files of earlier starts, so that a new one is the last.

  TensorBoard reads them in the order of their names, which begin with the time
  of the start, and a clock may have been set back since: they are numbered.
  """
  if not folder.exists():
    return
  for number, path in enumerate(sorted(folder.glob('events.out.tfevents.*'))):
    *start, _, rest = path.name.split('.', maxsplit=4)
    name = '.'.join([*start, f'{number:010}', rest])
    if name != path.name:
      path.rename(folder / name)


def _read(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the lines of a metrics file, but those that are none.

  Each of those is named, but for the last line, which a kill may tear.
  """
  lines = path.read_bytes().decode(errors='replace').splitlines()
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      if number < len(lines):
        logging.warning('%s:%d is not JSON: %s', path, number, error)
      continue
    if isinstance(record, dict) and type(record.get('step')) is int:
      records.append(record)
    else:
      logging.warning('%s:%d has no step, and is left out.', path, number)
  return records


def _keep_until(path: epath.Path, step: int) -> None:
  """Removes the lines of later steps, at once or not at all.

  A new run, from step 0, writes step 0 itself.
  """
  kept = [record for record in _read(path) if 0 < step >= record['step']]
  lines = [json.dumps(record) + '\n' for record in kept]
  write_file(path, ''.join(lines))


def plot_losses(workdir: os.PathLike | str) -> epath.Path:
  """Draws `{workdir}/loss.png` from `{workdir}/metrics.jsonl`.

  Returns:
    The picture's path.
  """
  folder = epath.Path(workdir)
  records = _read(folder / 'metrics.jsonl')
  plots = [
    plot for plot in PLOTS if any(plot[0] in record for record in records)
  ] or PLOTS[:1]
  figure = Figure(figsize=(8, 2.2 * len(plots)), layout='constrained')
  FigureCanvasAgg(figure)
  rows = figure.subplots(len(plots), 1, sharex=True, squeeze=False)[:, 0]
  for i, (axes, (key, title, unit)) in enumerate(zip(rows, plots, strict=True)):
    points = [
      (record['step'], math.nan if record[key] is None else record[key])
      for record in records
      if key in record
    ]
    marker = '.' if len(points) <= 50 else ''
    axes.plot(
      [step for step, _ in points],
      [value for _, value in points],
      color=f'C{i}',
      linewidth=1.4,
      marker=marker,
    )
    axes.set_title(title, loc='left', fontsize=10)
    axes.set_ylabel(unit)
    if key == 'learning_rate':
      axes.yaxis.set_major_formatter('{x:.1e}')
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    axes.spines[['top', 'right']].set_visible(False)
  rows[-1].set_xlabel('step')
  figure.align_ylabels()
  path = folder / 'loss.png'
  picture = io.BytesIO()
  figure.savefig(picture, dpi=150, format='png')
  write_file(path, picture.getvalue())
  return path
