"""What became of the records of a source, and whether that may be."""

import pathlib
from dataclasses import dataclass, field, fields
from typing import Any

from grit_jax.data.formats import Conversation, EmbeddingText
from grit_jax.data.records import (
  EMBEDDING,
  GENERATIVE,
  TOO_FEW_NEGATIVES,
  RecordError,
)
from grit_jax.errors import UserError
from grit_jax.files import check_keys, read_json

# Faults that are told in full, of each reason.
_MESSAGES = 3


@dataclass
class Report:
  """What became of the records of a split of a source.

  Attributes:
    records: Number of records in the data set.
    texts: Number of texts in it; a conversation is one.
    tokens: Number of tokens in it.
    cut_texts: Number of texts that were cut at their limit.
    cut_tokens: Number of tokens that cutting dropped.
    dropped: Number of sound records that are of no use, by reason.
    skipped: Number of faulty records, by reason.
    faults: What is wrong with the first of these, by reason.
  """

  records: int = 0
  texts: int = 0
  tokens: int = 0
  cut_texts: int = 0
  cut_tokens: int = 0
  dropped: dict[str, int] = field(default_factory=dict)
  skipped: dict[str, int] = field(default_factory=dict)
  faults: dict[str, list[str]] = field(default_factory=dict)

  def count_text(self, text: EmbeddingText | Conversation) -> None:
    """Adds a text of the data set."""
    self.texts += 1
    self.tokens += len(text.ids)
    self.cut_texts += text.cut > 0
    self.cut_tokens += text.cut

  def count_dropped(self, reason: str) -> None:
    """Adds a sound record that is not in the data set."""
    self.dropped[reason] = self.dropped.get(reason, 0) + 1

  def count_skipped(self, error: RecordError) -> None:
    """Adds a faulty record."""
    reason = error.reason
    self.skipped[reason] = self.skipped.get(reason, 0) + 1
    messages = self.faults.setdefault(reason, [])
    if len(messages) < _MESSAGES:
      messages.append(str(error))

  def add(self, other: 'Report') -> None:
    """Adds what became of later records."""
    for name in 'records', 'texts', 'tokens', 'cut_texts', 'cut_tokens':
      setattr(self, name, getattr(self, name) + getattr(other, name))
    for name in 'dropped', 'skipped':
      counts = getattr(self, name)
      for reason, count in getattr(other, name).items():
        counts[reason] = counts.get(reason, 0) + count
    for reason, messages in other.faults.items():
      mine = self.faults.setdefault(reason, [])
      mine += messages[: _MESSAGES - len(mine)]


def read_content(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what `dataset.json` of a data set says.

  Raises:
    UserError: It is missing or damaged; the message names the file and the key.
  """
  path = folder / 'dataset.json'
  content = read_json(
    path, name=str, kind=str, identity=dict, source=dict, splits=dict
  )
  if content['kind'] not in (EMBEDDING, GENERATIVE):
    raise UserError(f'{path}: kind is {content["kind"]!r}.')
  check_keys(
    content['identity'],
    f'{path}: identity',
    source=str,
    held_out_fraction=int | float,
  )
  check_keys(content['source'], f'{path}: source', name=str, state=dict)
  check_keys(content['splits'], f'{path}: splits', train=dict, held_out=dict)
  for name, split in content['splits'].items():
    where = f'{path}: splits: {name}'
    check_split(split, where)
    check_keys(split, where, place=list)
    if [type(text) for text in split['place']] != [str, str]:
      raise UserError(f'{where}: place is {split["place"]!r:.60}.')
  return content


def check_split(split: Any, where: str) -> None:
  """Checks what `dataset.json` or `part.json` says of a split.

  Raises:
    UserError: It is damaged; the message begins with `where`.
  """
  report = check_keys(split, where, report=dict)['report']
  where = f'{where}: report'
  kinds = {f.name: int if f.type is int else dict for f in fields(Report)}
  check_keys(report, where, **kinds)
  for name in report.keys() - kinds.keys():
    raise UserError(f'{where}: {name!r} is unknown.')
  for name, kind in ('dropped', int), ('skipped', int), ('faults', list):
    counts = report[name]
    check_keys(counts, f'{where}: {name}', **dict.fromkeys(counts, kind))
  fewest = split.get('fewest_negatives')
  if fewest is not None and (
    not isinstance(fewest, list) or [type(n) for n in fewest] != [int, int]
  ):
    raise UserError(f'{where}: fewest_negatives is {fewest!r:.60}.')


def read_reports(folder: pathlib.Path) -> list[Report]:
  """Returns the report of each split of a data set."""
  content = read_content(folder)
  return [Report(**split['report']) for split in content['splits'].values()]


def check_skipped(
  reports: list[Report], source: str, on_error: str, max_skipped_fraction: float
) -> None:
  """Checks that no more records were skipped than may be.

  Args:
    reports: Of the splits of a data set, or of its parts.
    source: What to call it.
    on_error: Of `grit_jax.data.dataset.prepare`, as is the next.
    max_skipped_fraction: What may be skipped of all.

  Raises:
    RecordError: There are more.
  """
  whole = Report()
  for report in reports:
    whole.add(report)
  faults = [messages[0] for messages in whole.faults.values()]
  if faults and on_error == 'stop':
    raise RecordError(faults[0])
  skipped = sum(whole.skipped.values())
  total = skipped + whole.records + sum(whole.dropped.values())
  if skipped > max_skipped_fraction * total:
    reasons = ', '.join(
      f'{count} {reason}' for reason, count in whole.skipped.items()
    )
    raise RecordError(
      f'{source}: {skipped} of {total} records were skipped ({reasons}), more '
      f'than max_skipped_fraction={max_skipped_fraction} allows; the '
      f'first: {"; ".join(faults)}'
    )


def find_too_few_negatives(
  folder: pathlib.Path, min_negatives: int
) -> RecordError | None:
  """Returns the error of a data set with too few negatives for what is asked.

  More may be asked for than when it was written.
  """
  content = read_content(folder)
  for split in content['splits'].values():
    if split['fewest_negatives']:
      found, number = split['fewest_negatives']
      before, after = split['place']
      try:
        check_negatives(found, min_negatives, f'{before}{number}{after}')
      except RecordError as error:
        return error
  return None


def check_negatives(found: int, expected: int, place: str) -> None:
  """Raises RecordError where a record has fewer negatives than expected."""
  if found < expected:
    raise RecordError(
      f'{place}: neg: found {found} negatives, expected {expected} or more; '
      'add some, or lower num_passages',
      TOO_FEW_NEGATIVES,
    )
