"""The right of one run at a time to write a workdir.

On a disk it is a lock, which the system takes back from a process that died.
An object store has none, so there it is a lease: an object that is created only
if it is absent, and that its holder renews. One that nobody renews is of a
process that died or lost the network, and is taken over. Clocks of two machines
are never compared: who waits looks whether the object changes.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import tensorstore
from absl import logging
from etils import epath

from grit_jax import files, processes
from grit_jax.checkpoint import kvstore, reason
from grit_jax.errors import UserError
from grit_jax.files import LockedError

_FILE = '.lock'
# Seconds between two renewals, and without one until a lease is taken over.
RENEW_SECONDS = 30.0
STALE_SECONDS = 120.0


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Callable[[], None]]:
  """Holds a workdir, local or gs://, which exists.

  Yields:
    What raises a UserError if the right has been lost; to be called before
    something is written that another run could overwrite.

  Of a run's processes the first holds it for all.

  Raises:
    LockedError: another run holds it; on gs:// after `STALE_SECONDS`.
  """
  if not processes.is_first():
    yield lambda: None
    return
  if files.is_local(workdir):
    with files.lock(workdir / _FILE):
      yield lambda: None
    return
  try:
    lease = _Lease(workdir)
    lease.take()
  except LockedError:
    raise
  except (ValueError, OSError) as error:
    raise UserError(
      f'{workdir}: {_FILE} cannot be taken: {reason(error)}.'
    ) from error
  renewer = threading.Thread(target=lease.keep, daemon=True)
  renewer.start()
  try:
    yield lease.check
  finally:
    lease.ended.set()
    renewer.join()
    lease.give_back()


class _Lease:
  """An object that says which process writes a folder of an object store."""

  def __init__(self, folder: epath.Path):
    """Prepares to take it; nothing is written yet."""
    self.folder = folder
    self.ended = threading.Event()
    self._store = tensorstore.KvStore.open(kvstore(folder)).result()
    self._content = {**files.describe_holder(), 'id': uuid.uuid4().hex}
    self._generation: bytes = b''
    self._renewed = 0.0
    self._is_lost = False

  def take(self) -> None:
    """Waits until it is free or stale, and takes it.

    Raises:
      LockedError: its holder has renewed it while this process waited.
    """
    start = changed = time.monotonic()
    last = None
    while True:
      found = self._store.read(_FILE).result()
      now = time.monotonic()
      if found.stamp.generation != last:
        if last is not None:
          changed = now
        last = found.stamp.generation
        if found.state != 'missing':
          logging.info(
            '%s is held: %s', self.folder / _FILE, found.value.decode()
          )
      is_stale = now - changed >= STALE_SECONDS
      if found.state == 'missing' or is_stale:
        if self._write(last):
          return
      elif (
        now - start >= STALE_SECONDS
        and changed > start
        and now - changed < 2 * RENEW_SECONDS
      ):
        raise files.refuse_second(self.folder, json.loads(found.value))
      time.sleep(RENEW_SECONDS / 10)

  def keep(self) -> None:
    """Renews it until it has ended or is lost."""
    while not self.ended.wait(RENEW_SECONDS) and not self._is_lost:
      try:
        self._is_lost = not self._write(self._generation)
      except (ValueError, OSError) as error:
        # The network may come back before anybody takes the lease over.
        logging.warning('%s: not renewed: %s', self.folder / _FILE, error)

  def check(self) -> None:
    """Raises a UserError if another process may have taken it over."""
    silent = time.monotonic() - self._renewed
    if self._is_lost or silent >= STALE_SECONDS:
      raise UserError(
        f'{self.folder}: another run has taken the workdir over, or may have: '
        f'{_FILE} was renewed {silent:.0f} s ago for the last time. The '
        'newest checkpoint is whole; the same command goes on from it.'
      )

  def give_back(self) -> None:
    """Deletes it, if it is still this process's."""
    try:
      deleted = self._store.write(_FILE, None, if_equal=self._generation)
      deleted.result(RENEW_SECONDS)
    except (ValueError, OSError) as error:
      logging.warning('%s: not deleted: %s', self.folder / _FILE, error)

  def _write(self, expected: bytes) -> bool:
    """Replaces what has a generation; says whether the object is ours now."""
    now = time.monotonic()
    content = json.dumps({**self._content, 'renewed': time.time()})
    written = self._store.write(_FILE, content, if_equal=expected)
    written.result(RENEW_SECONDS)
    # Not by the answer: one that got lost would make us take it for another's.
    found = self._store.read(_FILE).result(RENEW_SECONDS)
    if found.state == 'missing':
      return False
    if json.loads(found.value).get('id') != self._content['id']:
      return False
    self._generation, self._renewed = found.stamp.generation, now
    return True
