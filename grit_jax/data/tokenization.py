"""From sources to tokenized data sets, each once.

A data set is reused while its content, the tokenizer and the limits stay the
same; the name of its folder says so.
"""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Generator, Iterator
from typing import Any

import tqdm
from absl import logging

from grit_jax.data import merging, parts, records
from grit_jax.data.examples import FORMAT_VERSION
from grit_jax.data.parts import SPLITS, PartTask, Settings
from grit_jax.data.records import RecordError
from grit_jax.data.reports import (
  Report,
  check_skipped,
  find_too_few_negatives,
  read_content,
  read_reports,
)
from grit_jax.data.sources import Source
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.data.workers import count_cores, write_parts
from grit_jax.errors import UserError
from grit_jax.files import LockedError, is_local, lock, publish, writing

# A file that changed less than this long before it was read may have changed
# again since, at what its file system takes for the same time.
_CLOCK_SECONDS = 2


def tokenize(
  sources: list[Source],
  tokenizer: Tokenizer,
  directory: str | os.PathLike,
  settings: Settings,
  workers: int | None = None,
) -> list[pathlib.Path]:
  """Returns the folders of tokenized data sets, made where they are missing.

  Every record is validated. A data set appears in the directory whole or not
  at all. A second process that wants the same waits for the first; one that
  was killed left parts of a data set, which the next one goes on from.

  Args:
    sources: Where records come from.
    tokenizer: The tokenizer.
    directory: Where tokenized data sets lie: a folder on a local or mounted
      disk, since the index is mapped into memory.
    settings: What is asked of the data.
    workers: Processes; None for one a core.

  Returns:
    The folder of each source's data set.

  Raises:
    RecordError: A record is faulty, and `settings.on_error` is `stop`, the
      message beginning with its place; or too many are; or a file is not
      whole, or changes meanwhile.
    UserError: The disk is full, or is no disk, or a worker was killed.
  """
  if not is_local(directory):
    raise UserError(
      f'{directory}: tokenized data sets need a folder on a local or mounted '
      'disk'
    )
  directory = pathlib.Path(directory)
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  jobs = [_Job(source, tokenizer, directory, settings) for source in sources]
  with contextlib.ExitStack() as stack:
    # In one order everywhere: two processes never wait for each other.
    for job in sorted(jobs, key=lambda job: job.whole.name):
      stack.enter_context(lock(_lock_file(job.whole), wait=True))
    waiting = [job for job in jobs if job.find() is None]
    bar = stack.enter_context(
      tqdm.tqdm(
        total=sum(job.source.size for job in waiting),
        bar_format='tokenizing {percentage:3.0f}% |{bar}| {remaining} left',
        disable=None if waiting else True,
        dynamic_ncols=True,
        leave=False,
      )
    )
    while waiting:
      with contextlib.closing(
        _write_jobs(waiting, bar, workers or count_cores())
      ) as written:
        waiting = [job for job in written if not job.merge()]
    # All are there by now, so `find` returns no None.
    return [job.find() or job.whole for job in jobs]


def _write_jobs(
  jobs: list['_Job'], bar: tqdm.tqdm, workers: int
) -> Generator['_Job']:
  """Writes what parts are missing, and yields each job that has them all."""
  job_of = {}

  def list_tasks() -> Iterator[PartTask]:
    for job in jobs:
      for task in job.tasks(bar):
        job_of[task.folder] = job
        yield task

  unfinished = list(jobs)
  tokenizer, settings = jobs[0].tokenizer, jobs[0].settings
  with contextlib.closing(
    write_parts(list_tasks(), tokenizer, settings, workers)
  ) as written:
    for task in written:
      job = job_of.pop(task.folder)
      # Parts come in order: what comes before this one's job is complete.
      while unfinished[0] is not job:
        yield unfinished.pop(0)
      job.advance(bar, task.part.position)
  yield from unfinished


class _Job:
  """A source that is to be tokenized."""

  def __init__(
    self,
    source: Source,
    tokenizer: Tokenizer,
    directory: pathlib.Path,
    settings: Settings,
  ):
    self.source, self.tokenizer, self.settings = source, tokenizer, settings
    self._directory = directory
    # Before the content is read for the first time.
    self._state = source.state()
    # What decides the content of the data set, but for faulty records.
    self._identity = {
      'format': FORMAT_VERSION,
      'source': _find_fingerprint(source, directory),
      'tokenizer': tokenizer.fingerprint,
      'limits': settings.limits(source.kind),
      'held_out_fraction': settings.held_out_fraction,
    }
    text = json.dumps(self._identity, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    # The folder of a data set without a record skipped.
    self.whole = directory / f'{source.name}-{fingerprint}'
    # And of one with some; few negatives are a fault.
    needed = settings.min_negatives if source.kind == records.EMBEDDING else 0
    self._skipping = directory / f'{self.whole.name}-skip{needed}'
    self._incomplete = directory / f'{self._skipping.name}.incomplete'
    self._parts: list[pathlib.Path] = []
    # By part and place: why a record must be skipped, besides its content.
    self._excluded: dict[int, dict[tuple[str, int], str]] = {}
    self._shown = 0

  def find(self) -> pathlib.Path | None:
    """Returns the folder of the data set; None if there is none yet.

    If there is, what a kill has left of its parts goes.

    Raises:
      RecordError: A record has too few negatives, or too many were skipped.
    """
    folder = self._find()
    if folder is not None:
      shutil.rmtree(self._incomplete, ignore_errors=True)
    return folder

  def _find(self) -> pathlib.Path | None:
    if self.whole.exists():
      error = find_too_few_negatives(self.whole, self.settings.min_negatives)
      if error is None:
        return self.whole
      if self.settings.on_error == 'stop':
        raise error
    if self._skipping.exists():
      self._check_skipped(read_reports(self._skipping))
      return self._skipping
    return None

  def tasks(self, bar: tqdm.tqdm) -> Iterator[PartTask]:
    """Cuts the source, and yields what parts are missing."""
    self._parts = []
    self._remove_stale()
    places = {split: self.source.place(split) for split in SPLITS}
    for part in parts.cut(self.source, self.settings.held_out_fraction):
      excluded = self._excluded.get(part.index, {})
      suffix = '.distinct' if excluded else ''
      folder = self._incomplete / f'part-{part.index:05d}{suffix}'
      self._parts.append(folder)
      if parts.is_written(folder, part):
        self.advance(bar, part.position)
      else:
        yield PartTask(part, folder, self.source.kind, places, excluded)

  def advance(self, bar: tqdm.tqdm, position: int) -> None:
    """Moves the bar to a position in the source."""
    if position > self._shown:
      bar.update(position - self._shown)
      self._shown = position

  def merge(self) -> bool:
    """Makes the data set of the parts; False: some must be written anew.

    Raises:
      RecordError: See `tokenize`.
    """
    if self.source.state() != self._state:
      shutil.rmtree(self._incomplete)
      raise RecordError(
        f'{self.source}: changed while it was being prepared; start again '
        'when it stays as it is'
      )
    if not self._excluded and self._exclude_duplicates():
      return False
    reports = [r for part in self._parts for r in _part_reports(part)]
    self._check_skipped(reports)
    skipped = any(report.skipped for report in reports)
    content = {
      'name': self.source.name,
      'kind': self.source.kind,
      'identity': self._identity,
      'source': {'name': str(self.source), 'state': self._state},
      'places': {split: self.source.place(split) for split in SPLITS},
    }
    merged = self._incomplete / 'merged'
    with writing(self._directory):
      merging.merge(self._parts, merged, self.source.kind, content)
      publish(merged, self._skipping if skipped else self.whole)
      shutil.rmtree(self._incomplete)
    return True

  def _check_skipped(self, reports: list[Report]) -> None:
    check_skipped(
      reports,
      str(self.source),
      self.settings.on_error,
      self.settings.max_skipped_fraction,
    )

  def _exclude_duplicates(self) -> bool:
    """Finds records with the id of an earlier one; says if there are any."""
    found = list(merging.find_duplicates(self._parts))
    for part, later, first in sorted(found):
      where, other = self.source.where(*later), self.source.where(*first)
      message = f'{where}: its id is also that of {other}'
      if self.settings.on_error == 'stop':
        raise RecordError(message, records.DUPLICATE_ID)
      self._excluded.setdefault(part, {})[later] = message
    return bool(found)

  def _remove_stale(self) -> None:
    """Removes parts of what the source was, unless they are being written."""
    name = re.escape(self.source.name)
    pattern = re.compile(rf'({name}-[0-9a-f]{{16}})-skip\d+\.incomplete')
    for path in self._directory.iterdir():
      match = pattern.fullmatch(path.name)
      if not match or path == self._incomplete:
        continue
      place = self._directory / match[1]
      if place == self.whole:
        shutil.rmtree(path)
        continue
      with contextlib.suppress(LockedError), lock(_lock_file(place)):
        shutil.rmtree(path)


def _lock_file(folder: pathlib.Path) -> pathlib.Path:
  # Beside the folder, which is replaced as a whole.
  return folder.with_name(f'.{folder.name}.lock')


def _part_reports(folder: pathlib.Path) -> list[Report]:
  content = parts.read_part(folder)
  return [Report(**split['report']) for split in content['splits'].values()]


def _find_fingerprint(source: Source, directory: pathlib.Path) -> str:
  """Returns the source's fingerprint, known or computed."""
  state = source.state()
  known = []
  for path in directory.glob(f'{glob.escape(source.name)}-*/dataset.json'):
    content = read_content(path.parent)
    fingerprint = content['identity']['source']
    if is_settled(content['source']['state'], state, path):
      return fingerprint
    if content['source']['state'].get('path') == state.get('path'):
      known.append(fingerprint)
  fingerprint = source.fingerprint()
  if known and fingerprint not in known:
    logging.info('%s has changed, and is tokenized anew.', source)
  return fingerprint


def is_settled(
  kept: dict[str, Any], now: dict[str, Any], path: pathlib.Path
) -> bool:
  """Says whether a source is certainly what it was.

  Args:
    kept: Its state then.
    now: Its state now.
    path: A file that was written right after the source was read.
  """
  if kept != now:
    return False
  changed = now.get('changed')
  if changed is None:
    return True
  return changed < path.stat().st_mtime_ns - _CLOCK_SECONDS * 10**9
