"""Records of the reference's JSON lines, validated, and where they come from.

A line is one record, of one of two kinds:

- embedding: `{"query": TEXT, "pos": [TEXT, ...], "neg": [TEXT, ...]}`, where a
  TEXT is a pair `[instruction, text]` or a plain string;
- generative: `{"text": [user, assistant, user, assistant, ...]}`, or
  `{"text": "plain"}`.

Either may have an "id", a string or a number, which no other record of its data
set has. Other fields of a line are ignored. `grit_jax.data.sources` finds the
lines.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from grit_jax.errors import UserError

EMBEDDING: Final = 'embedding'
GENERATIVE: Final = 'generative'


# Why a record is not what it must be, as reports count it.
ANOTHER_KIND = 'another kind'
DUPLICATE_ID = 'duplicate id'
EMPTY_TEXT = 'empty text'
NO_ROOM = 'instruction without room for a text'
NOT_JSON = 'not valid JSON'
NOT_UTF8 = 'not UTF-8'
NULL_CHARACTER = 'null character'
SURROGATE = 'half a surrogate pair'
TOO_FEW_NEGATIVES = 'too few negatives'
WRONG_FIELDS = 'missing or wrong fields'


class RecordError(UserError):
  """A record, or a file of records, that is not what it must be.

  Attributes:
    reason: For a record why, as reports count it; "" for a file.
  """

  def __init__(self, message: str, reason: str = ''):
    """Keeps both.

    Args:
      message: The place, and what is wrong there.
      reason: See the class.
    """
    super().__init__(message)
    self.reason = reason


class Text(NamedTuple):
  """A text to embed.

  Attributes:
    instruction: What the embedding is for; "" for none, as for documents.
      None for a plain string, which is not formatted at all (see
      `grit_jax.data.formats`).
    text: The text itself, never blank.
  """

  instruction: str | None
  text: str


@dataclass(frozen=True)
class EmbeddingRecord:
  """A query with passages that answer it and passages that do not.

  Attributes:
    query: The query.
    positives: One passage or more that answer it.
    negatives: Any number of hard negatives.
    id: What the record calls itself, as JSON; None if it has no id.
  """

  query: Text
  positives: tuple[Text, ...]
  negatives: tuple[Text, ...]
  id: str | None = None

  @property
  def texts(self) -> tuple[Text, ...]:
    """The query, the positives and the negatives, in that order."""
    return (self.query, *self.positives, *self.negatives)


@dataclass(frozen=True)
class GenerativeRecord:
  """A conversation, or a plain text.

  Attributes:
    turns: The turns, user and assistant alternating, an even number; of a
      plain text the text alone.
    plain: Whether it is a plain text.
    id: As of `EmbeddingRecord`.
  """

  turns: tuple[str, ...]
  plain: bool = False
  id: str | None = None


Record = EmbeddingRecord | GenerativeRecord


def kind_of(record: Record) -> str:
  """Names the kind of a record: `EMBEDDING` or `GENERATIVE`."""
  return EMBEDDING if isinstance(record, EmbeddingRecord) else GENERATIVE


def strings_of(record: Record) -> Iterator[str]:
  """Iterates over every string of a record, instructions included."""
  if isinstance(record, GenerativeRecord):
    yield from record.turns
    return
  for text in record.texts:
    if text.instruction:
      yield text.instruction
    yield text.text


def parse(line: str | bytes, where: str, kind: str | None = None) -> Record:
  """Reads one JSON line.

  A user turn may be empty; every other text must have a character that is not
  blank.

  Args:
    line: The line, as text or UTF-8; a line end is ignored.
    where: Where the line stands, such as "data/a.jsonl:17", for the message.
    kind: The kind that it must be of; None for either.

  Returns:
    The record.

  Raises:
    RecordError: The line is no such record. The message begins with `where`,
      then names the field, what was found and what is expected.
  """
  record = _parse_record(line, where)
  if kind is not None and kind_of(record) != kind:
    raise RecordError(
      f'{where}: found a record of the {kind_of(record)} kind among records of '
      f'the {kind} kind, expected one kind a data set',
      ANOTHER_KIND,
    )
  return record


def _parse_record(line: str | bytes, where: str) -> Record:
  fields = parse_json(line, where)
  if not isinstance(fields, dict):
    raise mismatch(where, 'the line', fields, 'an object')
  embedding = [name for name in ('query', 'pos', 'neg') if name in fields]
  if embedding and 'text' in fields:
    raise RecordError(
      f'{where}: found both "{embedding[0]}" and "text", expected an embedding '
      'record or a generative one',
      WRONG_FIELDS,
    )
  if embedding:
    return _parse_embedding(fields, where)
  if 'text' in fields:
    return _parse_generative(fields, where)
  found = ', '.join(f'"{name}"' for name in list(fields)[:5]) or 'no field'
  raise RecordError(
    f'{where}: found {found}, expected "query", "pos" and "neg" (embedding) '
    'or "text" (generative)',
    WRONG_FIELDS,
  )


def decode(line: bytes, where: str) -> str:
  """Returns a line as text.

  Raises:
    RecordError: It is not UTF-8; the message begins with `where`.
  """
  try:
    return line.decode('utf-8')
  except UnicodeDecodeError as error:
    raise RecordError(
      f'{where}: not UTF-8: {error.reason} at byte {error.start}', NOT_UTF8
    ) from error


def parse_json(line: str | bytes, where: str) -> Any:
  """Returns what a line holds.

  Raises:
    RecordError: It is not JSON in UTF-8; the message begins with `where`.
  """
  if isinstance(line, bytes):
    line = decode(line, where)
  if not line.strip():
    raise RecordError(
      f'{where}: the line is empty, expected a JSON object', NOT_JSON
    )
  try:
    return json.loads(line)
  except json.JSONDecodeError as error:
    raise RecordError(
      f'{where}: not valid JSON: {error.msg} at column {error.colno}', NOT_JSON
    ) from error
  except RecursionError as error:
    raise RecordError(
      f'{where}: the JSON is nested too deeply', NOT_JSON
    ) from error
  except ValueError as error:  # An integer of thousands of digits.
    raise RecordError(f'{where}: not valid JSON: {error}', NOT_JSON) from error


def _parse_embedding(fields: dict[str, Any], where: str) -> EmbeddingRecord:
  for name in 'query', 'pos', 'neg':
    if name not in fields:
      hint = '; write [] for none' if name == 'neg' else ''
      raise RecordError(f'{where}: "{name}" is missing{hint}', WRONG_FIELDS)
  for name in 'pos', 'neg':
    if not isinstance(fields[name], list):
      raise mismatch(where, name, fields[name], 'a list of texts')
  if not fields['pos']:
    raise mismatch(where, 'pos', fields['pos'], 'at least one text')
  return EmbeddingRecord(
    query=_parse_text(fields['query'], 'query', where),
    positives=tuple(
      _parse_text(value, f'pos[{i}]', where)
      for i, value in enumerate(fields['pos'])
    ),
    negatives=tuple(
      _parse_text(value, f'neg[{i}]', where)
      for i, value in enumerate(fields['neg'])
    ),
    id=_parse_id(fields, where),
  )


def _parse_id(fields: dict[str, Any], where: str) -> str | None:
  value = fields.get('id')
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise mismatch(where, 'id', value, 'a string or a number')
  return json.dumps(value)


def _parse_text(value: Any, path: str, where: str) -> Text:
  if isinstance(value, str):
    return Text(None, check_string(value, path, where))
  if not isinstance(value, list) or len(value) != 2:
    raise mismatch(where, path, value, '[instruction, text] or a string')
  return Text(
    check_string(value[0], f'{path}[0]', where, blank=True),
    check_string(value[1], f'{path}[1]', where),
  )


def _parse_generative(fields: dict[str, Any], where: str) -> GenerativeRecord:
  value, identity = fields['text'], _parse_id(fields, where)
  if isinstance(value, str):
    turns = (check_string(value, 'text', where),)
    return GenerativeRecord(turns, plain=True, id=identity)
  expected = 'a string or a list of turns: user, assistant, user, ...'
  if not isinstance(value, list) or not value:
    raise mismatch(where, 'text', value, expected)
  if len(value) % 2:
    problem = 'no answer' if len(value) == 1 else 'the last one has no answer'
    raise RecordError(
      f'{where}: text: found {len(value)} turn(s), {problem}; expected user '
      'and assistant in turn, an even number',
      WRONG_FIELDS,
    )
  return GenerativeRecord(
    tuple(
      check_string(turn, f'text[{i}]', where, blank=i % 2 == 0)
      for i, turn in enumerate(value)
    ),
    id=identity,
  )


def check_string(value: Any, path: str, where: str, blank: bool = False) -> str:
  """Returns a value that must be a text.

  Args:
    value: What was found.
    path: The field it stands in, for the message.
    where: The line that the field stands in.
    blank: Whether it may be empty.

  Raises:
    RecordError: It is no string, or none that a text can be.
  """
  if not isinstance(value, str):
    raise mismatch(where, path, value, 'a string')
  if not blank and not value.strip():
    raise mismatch(where, path, value, 'a text that is not empty')
  if '\0' in value:
    raise RecordError(
      f'{where}: {path}: found a null character at {value.index(chr(0))}, '
      'expected text',
      NULL_CHARACTER,
    )
  if not value.isascii():
    try:
      value.encode('utf-8')
    except UnicodeEncodeError as error:
      raise RecordError(
        f'{where}: {path}: found half a surrogate pair at {error.start}, '
        'expected text',
        SURROGATE,
      ) from error
  return value


def mismatch(where: str, path: str, found: Any, expected: str) -> RecordError:
  """Returns the error of a field that holds something else than expected."""
  empty = isinstance(found, str) and not found.strip()
  return RecordError(
    f'{where}: {path}: found {_describe(found)}, expected {expected}',
    EMPTY_TEXT if empty else WRONG_FIELDS,
  )


def _describe(value: Any) -> str:
  if value is None:
    return 'null'
  if isinstance(value, bool):
    return 'a boolean'
  if isinstance(value, int | float):
    return f'the number {value}'
  if isinstance(value, list):
    return f'a list of {len(value)}' if value else 'an empty list'
  if isinstance(value, dict):
    return 'an object'
  if not value.strip():
    return 'an empty string' if not value else 'only blanks'
  return f'the string {value[:40]!r}'
