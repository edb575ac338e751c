"""Files and folders that are whole when they are there, and who writes them."""

import concurrent.futures
import contextlib
import datetime
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from typing import IO, Any

from etils import epath

from grit_jax.errors import UserError

_PARTIAL = '.partial'
CHECKSUMS = 'checksums.json'


class LockedError(UserError):
  """Another process writes the same."""


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
  """Turns an error of the disk into a message that says what to do.

  Raises:
    UserError: in place of an OSError.
  """
  try:
    yield
  except OSError as error:
    message = f'{folder}: cannot write: {error.strerror or error}'
    # A file in the way and a missing permission have types of their own.
    if type(error) is OSError:
      message += (
        '. If the disk is full, make room: the same command goes on from what '
        'is whole'
      )
    raise UserError(f'{message}.') from error


@contextlib.contextmanager
def new_file(
  path: str | os.PathLike, mode: str = 'wb', **options: Any
) -> Iterator[IO]:
  """Opens a local file that takes its name when all of it is on the disk.

  Until then what has the name stays as it is; for good, if an error comes.

  Args:
    path: the file.
    mode: `wb` or `w`.
    **options: of `open`.
  """
  path = pathlib.Path(path)
  partial = path.with_name(path.name + _PARTIAL)
  try:
    with open(partial, mode, **options) as file:
      yield file
      sync(file)
    partial.replace(path)
    # The name itself, on the disk.
    sync_folder(path.parent)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write_file(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file, local or gs://, whole or not at all."""
  content = content.encode() if isinstance(content, str) else content
  if is_local(path):
    with new_file(path) as file:
      file.write(content)
  else:
    # An object of an object store has all of it at once.
    epath.Path(path).write_bytes(content)


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes JSON for people and programs, as `write_file`."""
  write_file(path, json.dumps(value, indent=2) + '\n')


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder to fill, which takes the target's name at the end.

  Whatever happens before that, nothing has the target's name, and what was
  written is removed; after a kill, at the next start.

  Raises:
    LockedError: another process fills it.
  """
  folder = target.parent / f'.{target.name}{_PARTIAL}'
  folder.mkdir(parents=True, exist_ok=True)
  held = folder / '.lock'
  with lock(held):
    try:
      for path in set(folder.iterdir()) - {held}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
      yield folder
      held.unlink()
      publish(folder, target)
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
  sync_folder(target.parent)


def check_writable(path: str | os.PathLike) -> None:
  """Checks, before any work, that a local file can be written or replaced.

  Raises:
    UserError: its folder is missing or may not be written, or it is a folder.
  """
  path = pathlib.Path(path)
  if path.is_dir() or not path.parent.is_dir():
    what = 'it is a folder' if path.is_dir() else f'{path.parent} is no folder'
    raise UserError(f'{path}: cannot write: {what}.')
  if not os.access(path.parent, os.W_OK):
    raise UserError(f'{path}: cannot write into {path.parent}.')


def sync(file: IO) -> None:
  """Waits until what was written into a file is on the disk."""
  file.flush()
  os.fsync(file.fileno())


def sync_folder(folder: pathlib.Path) -> None:
  """Waits until the names in a folder are on the disk."""
  directory = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


def hash_file(path: str | os.PathLike) -> str:
  """Returns the SHA-256 of a local file, in hexadecimal digits.

  Raises:
    UserError: it is missing, or cannot be read.
  """
  check_file(path)
  try:
    with open(path, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read: {error.strerror or error}.'
    ) from error


def write_checksums(folder: pathlib.Path, but: str) -> None:
  """Writes `checksums.json`: of all files in a folder, but one, their SHA-256.

  Args:
    folder: the folder, with folders in it.
    but: the name of a file that people edit.
  """
  names = sorted(
    path.relative_to(folder).as_posix()
    # The lock of a `new_folder` is no part of it.
    for path in folder.rglob('[!.]*')
    if path.is_file() and path.name != but
  )
  write_json(
    folder / CHECKSUMS, {name: hash_file(folder / name) for name in names}
  )


def check_checksums(folder: pathlib.Path) -> None:
  """Compares files with `checksums.json`, where a folder has one.

  Raises:
    UserError: a file is not what was written; the message names it.
  """
  path = folder / CHECKSUMS
  if not path.exists():
    return
  try:
    checksums = dict(json.loads(path.read_bytes()))
  except (ValueError, TypeError) as error:
    raise UserError(f'{path} is damaged: {error}.') from error
  for name, checksum in checksums.items():
    # It may come from anybody, and reads nothing but its own folder.
    if pathlib.PurePosixPath(name).is_absolute() or '..' in name.split('/'):
      raise UserError(f'{path} names a file outside its folder: {name!r}.')
    if hash_file(folder / name) != checksum:
      raise UserError(
        f'{folder / name} is not what was written: its checksum is another. '
        f'It is damaged; or edited, and then take it out of {CHECKSUMS}.'
      )


def hash_json(value: Any) -> str:
  """Returns the SHA-256 of a value as JSON, whatever the order of its keys."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_files(folder: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
  """Returns the SHA-256 of files of a folder by name, several at a time.

  Raises:
    UserError: one is missing, or cannot be read.
  """
  names = sorted(names)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    digests = pool.map(lambda name: hash_file(folder / name), names)
    return dict(zip(names, digests, strict=True))


def check_file(path: epath.PathLike) -> None:
  """Refuses a folder, pipe, device or socket in place of a file.

  Opening a pipe would wait for ever, and a device may have no end. A path where
  nothing is passes: who opens it says so.

  Raises:
    UserError: it is none; the message names it.
  """
  if not is_local(path):
    return
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return
  if not stat.S_ISREG(mode):
    kind = 'a folder' if stat.S_ISDIR(mode) else 'a pipe, device or socket'
    raise UserError(f'{path}: {kind}, expected a regular file.')


def load_json(path: epath.PathLike) -> Any:
  """Returns what a JSON file, local or gs://, holds.

  Raises:
    UserError: it is missing, or no JSON; the message names it.
  """
  check_file(path)
  try:
    return json.loads(epath.Path(path).read_bytes())
  except FileNotFoundError as error:
    raise UserError(f'{path} does not exist.') from error
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read: {error.strerror or error}.'
    ) from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {error}') from error


def read_json(path: epath.PathLike, /, **keys: Any) -> dict[str, Any]:
  """Returns the object that a JSON file holds; see `check_keys`.

  Raises:
    UserError: it is missing, no JSON, or lacks a key.
  """
  return check_keys(load_json(path), str(path), **keys)


def check_keys(value: Any, where: str, /, **keys: Any) -> dict[str, Any]:
  """Checks an object of JSON.

  Args:
    value: the object.
    where: its file and place, for messages.
    **keys: what it must have, and the type of each, such as `int | None`.

  Raises:
    UserError: it is no object, or a key is missing or of another type.
  """
  if not isinstance(value, dict):
    raise UserError(f'{where} is not a JSON object.')
  for key, kind in keys.items():
    found = value.get(key)
    # To Python a boolean is a number too.
    if not isinstance(found, kind) or isinstance(found, bool) > (kind is bool):
      name = getattr(kind, '__name__', kind)
      raise UserError(
        f'{where}: {key!r} is {found!r:.60}, expected {name}.'
        if key in value
        else f'{where}: {key!r} is missing.'
      )
  return value


def is_local(path: epath.PathLike) -> bool:
  """Whether a path is of a local or mounted disk, not gs:// or the like."""
  return '://' not in os.fspath(path)


def check_place(path: epath.PathLike) -> None:
  """Checks that a path is of a disk or of gs://, which needs a package.

  Raises:
    UserError: it is neither, the package is missing, or its name is not UTF-8,
      which no JSON can hold.
  """
  try:
    os.fspath(path).encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{os.fspath(path)!a}: the name is not UTF-8; rename it'
    ) from error
  if is_local(path):
    return
  if not os.fspath(path).startswith('gs://'):
    raise UserError(f'{path} is neither a folder nor a place on gs://.')
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(f'{path}: gs:// needs a package: pip install gcsfs')


def describe_holder() -> dict[str, Any]:
  """Returns what a lock says of the process that holds it."""
  now = datetime.datetime.now(datetime.UTC)
  return {
    'pid': os.getpid(),
    'host': socket.gethostname(),
    'since': now.isoformat(timespec='seconds'),
  }


def refuse_second(what: epath.PathLike, holder: dict[str, Any]) -> LockedError:
  """Returns the error of who finds a lock held."""
  return LockedError(
    f'{what}: process {holder.get("pid", "?")} on {holder.get("host", "?")} '
    f'writes it, since {holder.get("since", "?")}. Wait until it ends, or take '
    'another folder.'
  )


@contextlib.contextmanager
def lock(file: pathlib.Path, wait: bool = False) -> Iterator[None]:
  """Holds the right to write; the system takes it back if the process dies.

  Args:
    file: the lock itself, in the folder that is written, or beside what is.
    wait: for a process that holds it, without end.

  Raises:
    LockedError: without `wait`: another process holds it, which the message
      names.
  """
  with writing(file.parent):
    opened = open(file, 'a+')
  with opened:
    try:
      fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      opened.seek(0)
      raise refuse_second(file.parent, _read_holder(opened)) from None
    opened.truncate(0)
    opened.write(json.dumps(describe_holder()))
    opened.flush()
    yield


def _read_holder(file: IO) -> dict[str, Any]:
  try:
    holder = json.loads(file.read())
  except ValueError:
    # It has the lock, and has not written yet.
    return {}
  return holder if isinstance(holder, dict) else {}
