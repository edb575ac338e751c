"""Files that are whole or not there, and locks that a killed process leaves."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from grit_jax import files
from grit_jax.errors import UserError
from grit_jax.files import LockedError

HOLD = """
import pathlib, sys, time
from grit_jax import files
with files.lock(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds a lock in a folder."""
  with subprocess.Popen(
    [sys.executable, '-c', HOLD, tmp_path / '.lock'], stdout=subprocess.PIPE
  ) as process:
    assert process.stdout.readline() == b'held\n'
    yield process
    process.kill()


def test_a_second_writer_is_told_who_writes_and_may_after_a_kill(
  tmp_path, holder
):
  host = os.uname().nodename
  with pytest.raises(
    LockedError, match=rf'process {holder.pid} on {host} .* since 20\d\d-'
  ):
    with files.lock(tmp_path / '.lock'):
      raise AssertionError('the lock is held twice')
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with files.lock(tmp_path / '.lock'):
    pass


def test_a_lock_is_held_by_one_of_a_process_too(tmp_path):
  with files.lock(tmp_path / '.lock'):
    with pytest.raises(LockedError, match=f'process {os.getpid()} '):
      with files.lock(tmp_path / '.lock'):
        raise AssertionError('the lock is held twice')


@pytest.mark.parametrize('stop', [OSError(errno.ENOSPC, 'full'), SystemExit])
def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path, stop):
  path = tmp_path / 'a'
  files.write_file(path, 'old')
  with pytest.raises(type(stop) if isinstance(stop, OSError) else stop):
    with files.new_file(path) as file:
      file.write(b'new')
      raise stop
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['a']


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  path, seen = tmp_path / 'a', []

  def fsync(descriptor: int) -> None:
    name = os.readlink(f'/proc/self/fd/{descriptor}')
    seen.append((os.path.basename(name), path.exists()))

  monkeypatch.setattr(os, 'fsync', fsync)
  files.write_json(path, {'a': 1})
  assert seen == [('a.partial', False), (tmp_path.name, True)]
  assert json.loads(path.read_text()) == {'a': 1}


def test_a_folder_is_filled_by_one_alone(tmp_path):
  with files.new_folder(tmp_path / 'new') as folder:
    (folder / 'a').write_text('a')
    with pytest.raises(LockedError, match=f'process {os.getpid()} '):
      with files.new_folder(tmp_path / 'new'):
        raise AssertionError('the folder is filled twice')
  assert os.listdir(tmp_path) == ['new']
  assert os.listdir(tmp_path / 'new') == ['a']
  # What a kill has left is no part of it.
  (tmp_path / '.other.partial').mkdir()
  (tmp_path / '.other.partial' / 'b').write_text('b')
  with files.new_folder(tmp_path / 'other') as folder:
    assert os.listdir(folder) == ['.lock']


def test_a_folder_that_is_not_finished_is_not_there(tmp_path):
  target = tmp_path / 'new'
  with pytest.raises(UserError, match=f'{target}: cannot write: .* make room'):
    with files.writing(target), files.new_folder(target) as folder:
      (folder / 'a').write_text('a')
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  assert not os.listdir(tmp_path)
  with files.new_folder(target) as folder:
    (folder / 'a').write_text('a')
    assert not target.exists()
  assert (target / 'a').read_text() == 'a'


def test_a_place_is_on_a_disk_or_on_gs(monkeypatch):
  files.check_place('folder')
  for place in 'http://a/b', 's3://a/b':
    with pytest.raises(UserError, match=f'{place} is neither a folder nor'):
      files.check_place(place)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(UserError, match='gs://a/b: .* pip install gcsfs'):
    files.check_place('gs://a/b')


def test_a_place_that_cannot_be_written_is_known_before_the_work(tmp_path):
  (tmp_path / 'file').touch()
  files.check_writable(tmp_path / 'file')
  files.check_writable(tmp_path / 'new')
  for path, message in (
    (tmp_path, 'it is a folder'),
    (tmp_path / 'none/new', 'none is no folder'),
    (tmp_path / 'file/new', 'file is no folder'),
  ):
    with pytest.raises(UserError, match=f'{path}: cannot write: .*{message}'):
      files.check_writable(path)
  assert os.listdir(tmp_path) == ['file']
