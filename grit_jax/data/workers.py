"""Processes that tokenize parts."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
from collections.abc import Generator, Iterable, Iterator

from grit_jax.data.parts import PART_BYTES, PartTask, Settings, write_part
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.errors import UserError

# Of a worker: what all parts have in common.
_common: tuple[Tokenizer, Settings]


def count_cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def write_parts(
  tasks: Iterable[PartTask],
  tokenizer: Tokenizer,
  settings: Settings,
  workers: int,
) -> Generator[PartTask]:
  """Writes parts; little work is done in this process.

  At most one part more than there are workers is held in memory.

  Args:
    tasks: the parts; taken as they are needed.
    tokenizer: the tokenizer.
    settings: what is asked of the data.
    workers: processes.

  Yields:
    Each task when its part is written, in order.

  Raises:
    RecordError: of `write_part`, for the first part that raises one.
    UserError: the disk is full, or a worker was killed.
  """
  tasks = iter(tasks)
  held, size = [], 0
  # To start processes takes as long as to tokenize some megabytes.
  while workers > 1 and size <= PART_BYTES:
    task = next(tasks, None)
    if task is None:
      break
    held.append(task)
    size += task.part.size
  if size <= PART_BYTES:
    for task in itertools.chain(held, tasks):
      write_part(task, tokenizer, settings, num_threads=-1)
      yield task
    return
  tasks = itertools.chain(held, tasks)
  del held
  try:
    yield from _write_with_workers(tasks, tokenizer, settings, workers)
  except concurrent.futures.process.BrokenProcessPool as error:
    raise UserError(
      'a process that tokenizes was killed, perhaps for want of memory. What '
      'is whole is kept: the same command goes on'
    ) from error


def _write_with_workers(
  tasks: Iterable[PartTask],
  tokenizer: Tokenizer,
  settings: Settings,
  workers: int,
) -> Iterator[PartTask]:
  executor = concurrent.futures.ProcessPoolExecutor(
    workers,
    # JAX has threads, which a fork would not survive.
    multiprocessing.get_context('spawn'),
    _start_worker,
    (tokenizer, settings),
  )
  try:
    waiting: collections.deque = collections.deque()
    for task in tasks:
      with _empty_main():
        waiting.append((task, executor.submit(_work, task)))
      if len(waiting) > workers:
        yield _wait(*waiting.popleft())
    while waiting:
      yield _wait(*waiting.popleft())
  finally:
    executor.shutdown(cancel_futures=True)


def _wait(task: PartTask, future: concurrent.futures.Future) -> PartTask:
  future.result()
  return task


@contextlib.contextmanager
def _empty_main() -> Iterator[None]:
  """Keeps workers that start from importing this process's main module.

  They do not need it, and `grit_jax.train` would bring JAX into each.
  """
  main = sys.modules['__main__']
  sys.modules['__main__'] = types.ModuleType('__main__')
  try:
    yield
  finally:
    sys.modules['__main__'] = main


def _start_worker(tokenizer: Tokenizer, settings: Settings) -> None:
  global _common
  _common = (tokenizer, settings)
  # Ctrl-C reaches all processes of a terminal; the first one ends the others.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(task: PartTask) -> None:
  tokenizer, settings = _common
  write_part(task, tokenizer, settings, num_threads=1)
