"""One run a workdir, on a disk and on an object store."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import object_store
import pytest
from etils import epath

from grit_jax import lease
from grit_jax.errors import UserError
from grit_jax.files import LockedError

WORKDIR = 'gs://bucket/run'
NAME = 'run/.lock'
# As the real ones stand to each other, a hundredth of their length.
RENEW, STALE = 0.3, 1.2

HOLD = f"""
import sys, time
from etils import epath
from grit_jax import lease
lease.RENEW_SECONDS, lease.STALE_SECONDS = {RENEW}, {STALE}
with lease.hold(epath.Path(sys.argv[1])) as check:
  print('held', flush=True)
  while True:
    time.sleep(0.05)
    check()
"""


@pytest.fixture(scope='module')
def server():
  with (
    object_store.serve() as (store, address),
    pytest.MonkeyPatch.context() as p,
  ):
    p.setenv('TENSORSTORE_GCS_HTTP_URL', address)
    p.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')
    yield store


@pytest.fixture
def store(server, monkeypatch):
  monkeypatch.setattr(lease, 'RENEW_SECONDS', RENEW)
  monkeypatch.setattr(lease, 'STALE_SECONDS', STALE)
  server.objects.clear()
  server.is_reachable = True
  server.before_write = lambda: None
  return server


@pytest.fixture
def start():
  """Starts processes that hold a workdir until they are killed."""
  processes = []

  def start_one(workdir: os.PathLike | str) -> subprocess.Popen:
    process = subprocess.Popen(
      [sys.executable, '-c', HOLD, os.fspath(workdir)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    processes.append(process)
    assert process.stdout.readline() == 'held\n'
    return process

  yield start_one
  for process in processes:
    process.kill()
    process.communicate()


def hold(workdir: os.PathLike | str) -> None:
  with lease.hold(epath.Path(workdir)) as check:
    check()


@pytest.mark.parametrize('place', ['disk', 'store'])
def test_a_second_run_is_refused_and_a_killed_ones_place_taken(
  place, store, start, tmp_path
):
  workdir = tmp_path if place == 'disk' else WORKDIR
  first = start(workdir)
  with pytest.raises(
    LockedError,
    match=rf'{workdir}: process {first.pid} on {os.uname().nodename} .* since ',
  ):
    hold(workdir)
  first.send_signal(signal.SIGKILL)
  first.wait()
  hold(workdir)


def test_a_store_that_does_not_answer_is_one_message(store):
  with pytest.raises(UserError, match='gs://B: .lock cannot be taken: .*B'):
    hold('gs://B')
  store.is_reachable = False
  with pytest.raises(UserError, match=f'{WORKDIR}: .lock cannot be taken: '):
    hold(WORKDIR)


def test_who_ends_gives_the_lease_back(store):
  with lease.hold(epath.Path(WORKDIR)):
    holder = json.loads(store.objects[NAME][1])
    assert holder['pid'] == os.getpid() and holder['renewed'] > 0
  assert not store.objects


def test_of_two_that_find_it_free_one_gets_it(store):
  other = json.dumps({'pid': 7, 'host': 'h', 'since': 'now', 'id': 'x'})
  generations = itertools.count(10**6)

  def come_first() -> None:
    # Between our look and our write; and it lives, and renews.
    store.objects[NAME] = next(generations), other.encode()

  store.before_write = come_first
  with pytest.raises(UserError, match='process 7 on h writes it'):
    with lease.hold(epath.Path(WORKDIR)):
      raise AssertionError('it is held by another')
  assert json.loads(store.objects[NAME][1])['pid'] == 7


def test_who_waits_gets_it_when_the_holder_ends(store, start):
  first = start(WORKDIR)
  os.kill(first.pid, signal.SIGSTOP)
  # Of a machine that hangs: nobody renews.
  begun = time.monotonic()
  with lease.hold(epath.Path(WORKDIR)) as check:
    assert STALE <= time.monotonic() - begun < 4 * STALE
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(timeout=10) == 1
    assert 'another run has taken the workdir over' in first.stderr.read()
    check()
    assert json.loads(store.objects[NAME][1])['pid'] == os.getpid()


def test_a_holder_that_does_not_reach_the_store_stops_in_time(store):
  with pytest.raises(UserError, match='renewed [0-9]+ s ago'):
    with lease.hold(epath.Path(WORKDIR)) as check:
      time.sleep(2 * RENEW)
      check()
      store.is_reachable = False
      time.sleep(STALE + RENEW)
      store.is_reachable = True
      with store.lock:
        store.objects.pop(NAME, None)
      check()
