"""A side of the race takes its turns: a process that is told when to run.

Commands come as JSON lines on the standard input, and results go back as JSON
lines on what was the standard output; whatever libraries print goes to the
standard error instead.
"""

import ctypes
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Timed calls of each product, of which the fastest counts.
REPEATS = 5


def serve(commands: dict[str, Callable[..., Any]]) -> None:
  """Carries out commands until there are no more.

  Args:
    commands: by name; takes the keywords of the command, returns what JSON can
      hold.
  """
  results = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  for line in sys.stdin:
    command = json.loads(line)
    result = commands[command.pop('do')](**command)
    print(json.dumps(result), file=results, flush=True)


class Side:
  """A side's process, seen from the race."""

  def __init__(self, script: pathlib.Path, *arguments: str):
    """Starts the process; it waits for its first command."""
    self.name = ' '.join([script.stem, *arguments])
    self._process = subprocess.Popen(
      [sys.executable, script, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __call__(self, do: str, **keywords: Any) -> Any:
    """Has a command carried out, and returns its result."""
    try:
      self._process.stdin.write(json.dumps({'do': do, **keywords}) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # The process has ended: so has what is read.
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(
        f'{self.name} ended in {do!r} with status {self._process.wait()}.'
      )
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


def fastest(call: Callable[[], Any]) -> float:
  """Returns the seconds of the fastest of some calls, after one to warm up."""
  call()
  seconds = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def measure_products(
  shapes: Sequence[tuple[int, int, int]], make: Callable[..., Callable]
) -> list[dict[str, float]]:
  """Times the three products of a linear layer in training.

  Args:
    shapes: rows, inputs and outputs of layers.
    make: of a shape, a function that runs the named product once and waits.

  Returns:
    For each shape the operations a second of `forward`, [m, k] by [k, n], and
    of the gradients of `inputs`, [m, n] by [n, k], and `weights`, [k, m] by
    [m, n].
  """
  found = []
  for m, k, n in shapes:
    run = make(m, k, n)
    found.append(
      {
        name: 2 * m * k * n / fastest(lambda name=name, run=run: run(name))
        for name in ('forward', 'inputs', 'weights')
      }
    )
  return found


def forget_peak() -> None:
  """Makes the peak of this process's memory what it holds now.

  What was freed goes back to the system first: compilers leave much.
  """
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path('/proc/self/clear_refs').write_text('5')


def memory_mib(field: str) -> float:
  """Returns `VmRSS`, what this process holds, or `VmHWM`, its peak."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) / 1024
  raise OSError(f'/proc/self/status has no {field}: this needs Linux.')
