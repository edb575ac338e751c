"""Tests of metrics."""

import json
import math
import pathlib
import time

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (
  EventAccumulator,
)
from tensorboardX.event_file_writer import EventFileWriter
from tensorboardX.proto import event_pb2

from grit_jax import metrics
from grit_jax.metrics import MetricsWriter, plot_losses


def values_of(step: int) -> dict[str, float]:
  return {
    'loss': 10 / (step + 3),
    'loss_rep': np.float32(1 / (step + 1)),
    'loss_gen': math.pi / (step + 1),
    'learning_rate': 2e-5 / step,
    'tokens_per_second': 1000.0,
  }


def train(workdir: pathlib.Path, start: int, stop: int) -> None:
  with MetricsWriter(workdir, start, 20) as writer:
    for step in range(start + 1, stop + 1):
      if step % 2:
        writer.advance(step)
      else:
        writer.write(step, values_of(step))


def read_lines(workdir: pathlib.Path) -> list[str]:
  text = (workdir / 'metrics.jsonl').read_text()
  assert text.endswith('\n')
  return text.splitlines()


def test_a_line_holds_the_step_and_the_values_in_order(tmp_path):
  train(tmp_path, 0, 6)
  lines = [json.loads(line) for line in read_lines(tmp_path)]
  assert [line.pop('step') for line in lines] == [2, 4, 6]
  for step, line in zip((2, 4, 6), lines, strict=True):
    # Equal, not close: nothing is rounded.
    assert line == values_of(step)
    assert list(line) == list(values_of(step))


def test_a_line_is_on_the_disk_when_write_returns(tmp_path):
  with MetricsWriter(tmp_path, 0, 20) as writer:
    writer.write(1, {'loss': 1.5})
    assert read_lines(tmp_path) == ['{"step": 1, "loss": 1.5}']


def test_an_evaluation_has_a_line_and_a_plot_of_its_own(tmp_path):
  train(tmp_path / 'without', 0, 4)
  with MetricsWriter(tmp_path / 'with', 0, 20) as writer:
    writer.write(2, values_of(2))
    writer.write_evaluation(2, {'recall_at_10': 0.25, 'candidates': 8})
    writer.write(4, values_of(4))
  lines = [json.loads(line) for line in read_lines(tmp_path / 'with')]
  assert [len(line) for line in lines] == [6, 3, 6]
  assert lines[1] == {
    'step': 2, 'evaluation/recall_at_10': 0.25, 'evaluation/candidates': 8,
  }  # fmt: skip
  pictures = [
    Image.open(plot_losses(tmp_path / name)) for name in ('without', 'with')
  ]
  assert pictures[0].height < pictures[1].height


def test_arrays_are_written_as_numbers(tmp_path):
  with MetricsWriter(tmp_path, 0, 20) as writer:
    writer.write(np.int32(1), {'loss': jax.numpy.float32(0.1)})
  line = json.loads(read_lines(tmp_path)[0])
  assert line == {'step': 1, 'loss': float(np.float32(0.1))}


def test_what_is_not_finite_is_null(tmp_path):
  with MetricsWriter(tmp_path, 0, 20) as writer:
    writer.write(1, {'loss': math.nan, 'loss_gen': math.inf, 'loss_rep': 1.0})
  assert read_lines(tmp_path) == [
    '{"step": 1, "loss": null, "loss_gen": null, "loss_rep": 1.0}'
  ]
  plot_losses(tmp_path)


@pytest.mark.parametrize('torn', ['', '{"step": 14, "lo', '{"step"', '{'])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path, torn):
  train(tmp_path / 'whole', 0, 20)
  train(tmp_path / 'resumed', 0, 13)
  path = tmp_path / 'resumed' / 'metrics.jsonl'
  path.write_text(path.read_text() + torn)
  train(tmp_path / 'resumed', 8, 20)
  assert path.read_bytes() == (tmp_path / 'whole' / path.name).read_bytes()
  assert not list(path.parent.glob('*.tmp'))


def test_a_last_line_that_lacks_its_newline_alone_is_kept(tmp_path):
  train(tmp_path, 0, 8)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_text()
  path.write_text(whole.removesuffix('\n'))
  with MetricsWriter(tmp_path, 8, 20):
    assert path.read_text() == whole


def test_a_new_run_starts_a_new_file(tmp_path):
  with MetricsWriter(tmp_path, 0, 20) as writer:
    writer.write(0, {'evaluation/ndcg': 0.5})
  with MetricsWriter(tmp_path, 0, 20) as writer:
    writer.write(0, {'evaluation/ndcg': 0.5})
  assert len(read_lines(tmp_path)) == 1


def test_a_rewrite_that_fails_leaves_the_file(tmp_path, monkeypatch):
  train(tmp_path, 0, 8)
  before = (tmp_path / 'metrics.jsonl').read_bytes()

  def fail(_: int) -> None:
    raise OSError('No space left on device')

  monkeypatch.setattr(metrics.os, 'fsync', fail)
  with pytest.raises(OSError, match='No space left'):
    MetricsWriter(tmp_path, 4, 20)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def read_events(path: pathlib.Path) -> list[event_pb2.Event]:
  """Reads a TensorBoard file: length, checksum, event, checksum."""
  content, events, start = path.read_bytes(), [], 0
  while start < len(content):
    length = int.from_bytes(content[start : start + 8], 'little')
    event = content[start + 12 : start + 12 + length]
    events.append(event_pb2.Event.FromString(event))
    start += 16 + length
  return events


def test_tensorboard_gets_the_scalars_and_a_resumed_run_purges(
  tmp_path, monkeypatch
):
  purged = []
  add_event = EventFileWriter.add_event

  def record(self, event):
    if event.HasField('session_log'):
      purged.append(event.step)
    add_event(self, event)

  monkeypatch.setattr(EventFileWriter, 'add_event', record)
  train(tmp_path, 0, 4)
  (path,) = (tmp_path / 'tensorboard').iterdir()
  scalars = {
    (event.step, value.tag): value.simple_value
    for event in read_events(path)
    for value in event.summary.value
  }
  expected = {
    (step, key): np.float32(value)
    for step in (2, 4)
    for key, value in values_of(step).items()
  }
  assert scalars == expected
  train(tmp_path, 2, 4)
  assert purged == [0, 3]


def test_tensorboard_reads_every_step_once_whatever_the_clock_says(
  tmp_path, monkeypatch
):
  day = 24 * 60 * 60
  for start, stop, moved in (0, 6, 0), (4, 10, -day), (8, 12, -400 * day):
    with monkeypatch.context() as clock:
      now = time.time() + moved
      clock.setattr(time, 'time', lambda now=now: now)
      train(tmp_path, start, stop)
  events = EventAccumulator(str(tmp_path / 'tensorboard'))
  events.Reload()
  steps = [event.step for event in events.Scalars('loss')]
  assert steps == [2, 4, 6, 8, 10, 12]


def test_the_bar_shows_steps_losses_speed_and_time_left(tmp_path, capsys):
  with MetricsWriter(tmp_path, 8, 20) as writer:
    writer.write(10, {'loss': 3.0, 'loss_gen': 2.0, 'tokens_per_second': 1e4})
    writer.advance(11)
    writer._bar.refresh()
    shown = capsys.readouterr().err.split('\r')[-1]
    assert 'step 11/20' in shown
    assert 'loss_gen=2.0000, 10,000 tokens/s' in shown
    assert ' left' in shown and 'loss_rep' not in shown


def test_the_first_process_alone_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  train(tmp_path / 'run', 0, 4)
  assert not list(tmp_path.iterdir())
  assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('mode', ['unified', 'embedding', 'empty'])
def test_the_picture_has_axes_for_what_there_is(tmp_path, mode, monkeypatch):
  figures = []
  figure = metrics.Figure

  def keep(*arguments, **keywords):
    figures.append(figure(*arguments, **keywords))
    return figures[-1]

  monkeypatch.setattr(metrics, 'Figure', keep)
  titles = ['Loss', 'Embedding loss', 'Generative loss', 'Learning rate']
  with MetricsWriter(tmp_path, 0, 20) as writer:
    # An evaluation's line has none of the losses.
    writer.write(0, {'evaluation/ndcg': 0.5})
    for step in range(1, 9):
      values = values_of(step)
      if mode == 'embedding':
        del values['loss_gen']
      if mode != 'empty':
        writer.write(step, values)
  if mode == 'embedding':
    titles.remove('Generative loss')
  path = plot_losses(tmp_path)
  assert path == tmp_path / 'loss.png'
  assert path.read_bytes().startswith(b'\x89PNG')
  if mode != 'empty':
    axes = figures[0].axes
    assert [a.get_title(loc='left') for a in axes] == titles
    assert axes[-1].get_xlabel() == 'step'
    assert all(a.get_ylabel() for a in axes)
    (line,) = axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), range(1, 9))
    expected = [values_of(step)['loss'] for step in range(1, 9)]
    np.testing.assert_array_equal(line.get_ydata(), expected)
