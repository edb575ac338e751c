"""Kills a run again and again, and compares what it measures with a whole run.

  python benchmarks/kills.py --folder=/tmp/kills --output=kills.jsonl

trains the quickstart once undisturbed. Then it trains it again, ends the
process by SIGKILL at a random moment of its start, its steps or its saving,
starts it again, and so on; a run that comes to its end is followed by a new
one. After each start every line of metrics.jsonl is compared with the
undisturbed run's. A line is written for each kill:

  kill, seconds: its number, and how long the process had lived
  step, resumed: the last step that it had logged, and the one that the next
    start went on from; null: from none, or killed before it was there
  lines, difference: lines that the next start wrote, and the largest relative
    difference of any metric in them

Ends with 1 if a step is missing, there twice, or differs.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
# How fast a step was is no result.
TIMED = 'tokens_per_second'


class Run:
  """A workdir, and the command that trains in it."""

  def __init__(self, folder: pathlib.Path, name: str, flags: list[str]):
    """Names the workdir; nothing is started."""
    self.workdir, self.log = folder / name, folder / f'{name}.log'
    self._command = [
      sys.executable, '-m', 'grit_jax.train',
      f'--config={ROOT / "configs/quickstart.py"}', f'--workdir={self.workdir}',
      '--config.log_every=1', '--config.checkpoint.every_steps=5', *flags,
    ]  # fmt: skip
    # A start compiles what the first one has compiled; else it would be killed
    # at that most of the time.
    self._environment = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }

  def start(self, seconds: float | None) -> bool:
    """Starts the command, and kills it; says whether it had ended before.

    Raises:
      RuntimeError: it has failed.
    """
    with open(self.log, 'w') as log:
      process = subprocess.Popen(
        self._command, env=self._environment, stdout=log, stderr=log
      )
    try:
      status = process.wait(seconds)
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.wait()
      return False
    if status:
      raise RuntimeError(f'Status {status}: {self.log.read_text()[-2000:]}')
    return True

  def resumed(self) -> int | None:
    """Returns the step that the last start went on from; None: from none."""
    found = re.search(r'Going on from .*/(\d+)\.', self.log.read_text())
    return int(found[1]) if found else None

  def metrics(self) -> list[dict[str, float]]:
    """Returns the lines that are whole."""
    path = self.workdir / 'metrics.jsonl'
    if not path.exists():
      return []
    # The last may be torn.
    *lines, _ = path.read_text().split('\n')
    return [json.loads(line) for line in lines]


def compare(
  found: list[dict[str, float]], expected: list[dict[str, float]]
) -> float:
  """Returns the largest relative difference; infinite if lines are others."""
  largest = 0.0
  for one, other in zip(found, expected, strict=False):
    if one.keys() != other.keys() or one['step'] != other['step']:
      return float('inf')
    for name in one.keys() - {TIMED}:
      scale = max(abs(other[name]), 1e-30)
      largest = max(largest, abs(one[name] - other[name]) / scale)
  return largest


def main() -> None:
  """Trains the undisturbed run, kills others, and reports."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', required=True, type=pathlib.Path)
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--longest', type=float, default=30, help='seconds')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', required=True, type=pathlib.Path)
  flags, rest = parser.parse_known_args()
  flags.folder.mkdir(parents=True)
  whole = Run(flags.folder, 'whole', rest)
  whole.start(None)
  expected, draw = whole.metrics(), random.Random(flags.seed)
  run, kill, worst = Run(flags.folder, 'killed', rest), {}, 0.0
  with open(flags.output, 'a') as output:
    for number in range(flags.kills + 1):
      last = number == flags.kills
      while True:
        seconds = None if last else draw.uniform(0, flags.longest)
        start = time.monotonic()
        ended = run.start(seconds)
        lived = time.monotonic() - start
        found = run.metrics()
        if kill:
          resumed = run.resumed()
          kill['resumed'] = resumed
          kill['lines'] = sum(line['step'] > (resumed or 0) for line in found)
          kill['difference'] = compare(found, expected)
          if ended and len(found) != len(expected):
            kill['difference'] = float('inf')
          worst = max(worst, kill['difference'])
          output.write(json.dumps(kill) + '\n')
          output.flush()
          kill = {}
        if not ended or last:
          break
        shutil.rmtree(run.workdir)
      kill = {
        'kill': number + 1,
        'seconds': round(lived, 2),
        'step': found[-1]['step'] if found else 0,
      }
  print(f'{flags.kills} kills; largest difference {worst:.3g}')
  sys.exit(worst > 0)


if __name__ == '__main__':
  main()
