"""Folders that appear whole or not at all, whoever else writes them."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from grit_jax.errors import UserError


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
  """Turns an error of the disk into a message that says what to do."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{folder}: cannot write: {error.strerror or error}. What is whole is '
      'kept: make room, and the same command goes on'
    ) from error


@contextlib.contextmanager
def removed_afterwards(folder: pathlib.Path) -> Iterator[None]:
  """Removes a folder before and after what is done in it."""
  shutil.rmtree(folder, ignore_errors=True)
  try:
    yield
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def publish(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a folder once its files are on the disk; replaces the target."""
  for path in folder.rglob('*'):
    if path.is_file():
      with path.open('rb') as file:
        os.fsync(file.fileno())
  shutil.rmtree(target, ignore_errors=True)
  folder.rename(target)


@contextlib.contextmanager
def lock(place: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """Holds the right to write; the system takes it back if the process dies.

  Yields:
    Whether it is held; without `wait` another process may hold it.
  """
  with writing(place.parent):
    file = open(place.with_name(f'.{place.name}.lock'), 'w')
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
      return
    yield True
