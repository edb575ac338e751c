"""A cloud in a folder, and the programs that stand in for its clients."""

import ast
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
PATIENCE = 60  # Seconds for what takes one, on a machine that is busy.

# `uv` and `pip` of a worker: an environment whose `python` is this one.
PYTHON3 = f"""#!/usr/bin/env bash
echo "$*" >> "$HOME/installed"
if [[ -e $HOME/no_network ]]; then
  echo 'no network' >&2
  exit 1
fi
if [[ $3 == venv ]]; then
  mkdir -p "${{!#}}/bin"
  ln -sf {sys.executable} "${{!#}}/bin/python"
fi
"""


class Cloud:
  """The folder that `gcloud.py` describes, and a clone to launch from."""

  def __init__(self, folder: pathlib.Path, like: 'Cloud | None' = None):
    """Makes the folder, the clone, and programs on a PATH.

    Args:
      folder: for all of it.
      like: a cloud whose nodes and clone this one has too.
    """
    self.folder, self.clone = folder / 'cloud', folder / 'clone'
    if like:
      shutil.copytree(like.folder, self.folder, symlinks=True)
      shutil.copytree(like.clone, self.clone, symlinks=True)
    else:
      for name in 'nodes', 'queued', 'answers':
        (self.folder / name).mkdir(parents=True)
      shutil.copytree(ROOT / 'launch', self.clone / 'launch')
      self.git('init', '--quiet')
      self.commit()
    self.programs = folder / 'programs'
    self.programs.mkdir()
    gcloud = (
      f'#!/bin/sh\nexec {sys.executable} -I -S {HERE / "gcloud.py"} "$@"\n'
    )
    self.add_program('gcloud', gcloud)
    self.add_program('python3', PYTHON3)
    # Time goes by faster, and is counted.
    sleep = shutil.which('sleep')
    self.add_program('sleep', f'#!/bin/sh\n{sleep} 0.02\necho >> {folder}/naps')
    self.naps = folder / 'naps'
    self.environment = os.environ | {
      'CLOUD': str(self.folder),
      'PATH': f'{self.programs}:{os.environ["PATH"]}',
    }

  def copy(self, folder: pathlib.Path) -> 'Cloud':
    """Makes another cloud that has what this one has."""
    return Cloud(folder, self)

  def add_program(self, name: str, text: str) -> None:
    """Writes a program to the PATH."""
    path = self.programs / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def git(self, *arguments: str) -> None:
    """Runs git in the clone."""
    author = ('-c', 'user.name=a', '-c', 'user.email=a@example.com')
    subprocess.run(['git', *author, *arguments], cwd=self.clone, check=True)

  def commit(self) -> None:
    """Commits all of the clone."""
    self.git('add', '--all')
    self.git('commit', '--quiet', '--message=a')

  def start(self, script: str, *arguments: str) -> subprocess.Popen:
    """Starts a script of launch/tpu_vm."""
    return subprocess.Popen(
      [str(self.clone / 'launch' / 'tpu_vm' / script), *arguments],
      env=self.environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def run(self, script: str, *arguments: str, status: int = 0) -> str:
    """Runs a script, checks how it ends, and returns its output."""
    process = self.start(script, *arguments)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, output
    return output

  def calls(self, *words: str) -> list[list[str]]:
    """Returns the arguments of the calls to `gcloud compute tpus WORDS`."""
    path = self.folder / 'calls'
    lines = path.read_text().splitlines() if path.exists() else []
    prefix = ['compute', 'tpus', *words]
    calls = [ast.literal_eval(line) for line in lines]
    return [c[len(prefix) :] for c in calls if c[: len(prefix)] == prefix]

  def answer(self, command: str, text: str) -> None:
    """Sets what a command fails with, or `states`."""
    (self.folder / 'answers' / command).write_text(text)

  def homes(self) -> list[pathlib.Path]:
    """Returns the homes of all workers."""
    return sorted(self.folder.glob('nodes/*/workers/*'))

  def stop_machines(self) -> None:
    """Ends all that runs on workers, at once."""
    for pid in self.folder.glob('nodes/*/workers/*/grit_jax_run/pid'):
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except ProcessLookupError:
        pass

  def preempt(self, name: str) -> None:
    """Takes the pod's machines away."""
    self.stop_machines()
    for home in self.homes():
      shutil.rmtree(home)
    if (self.folder / 'queued' / name).exists():
      (self.folder / 'queued' / name).write_text('SUSPENDED')
    for states in self.folder.glob('nodes/*/states'):
      states.write_text('PREEMPTED')


@pytest.fixture(scope='session')
def empty(tmp_path_factory) -> Cloud:
  """A cloud with nothing in it, to be copied."""
  return Cloud(tmp_path_factory.mktemp('empty'))


@pytest.fixture
def cloud(tmp_path, empty) -> Iterator[Cloud]:
  """A cloud with nothing in it."""
  cloud = empty.copy(tmp_path)
  yield cloud
  cloud.stop_machines()


@pytest.fixture(scope='session')
def wait_until():
  """Waits until a condition holds."""

  def wait(condition, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
      assert time.monotonic() < end, f'{what} did not come.'
      time.sleep(0.01)

  return wait
