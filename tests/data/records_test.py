"""Tests of the JSON lines and their validation."""

import json

import pytest

from grit_jax.data import records
from grit_jax.data.records import (
  EmbeddingRecord,
  GenerativeRecord,
  RecordError,
  Text,
)


def parse(fields: object) -> records.Record:
  return records.parse(json.dumps(fields), 'data/a.jsonl:17')


def embedding(**fields: object) -> dict[str, object]:
  return {'query': ['i', 'q'], 'pos': [['', 'p']], 'neg': []} | fields


def test_pairs_and_plain_strings_may_stand_side_by_side():
  record = parse(
    {'query': ['i', 'q'], 'pos': ['p', ['', 'r']], 'neg': [['j', 'n']]}
  )
  assert record == EmbeddingRecord(
    query=Text('i', 'q'),
    positives=(Text(None, 'p'), Text('', 'r')),
    negatives=(Text('j', 'n'),),
  )
  assert [text.text for text in record.texts] == ['q', 'p', 'r', 'n']


def test_conversations_keep_their_turns_as_they_are():
  record = parse({'text': [' a ', ' b\n', '', 'd']})
  assert record == GenerativeRecord((' a ', ' b\n', '', 'd'))


def test_a_plain_text_is_told_from_a_conversation():
  assert parse({'text': 't'}) == GenerativeRecord(('t',), plain=True)


def test_bytes_and_text_parse_alike():
  line = json.dumps(embedding(query=['é', '日本']), ensure_ascii=False)
  assert records.parse(line, '') == records.parse(line.encode() + b'\r\n', '')


def test_other_fields_are_ignored():
  assert parse(embedding(origin=3)) == parse(embedding())


def test_the_kind_of_a_record_is_told():
  assert records.kind_of(parse(embedding())) == records.EMBEDDING
  assert records.kind_of(parse({'text': 't'})) == records.GENERATIVE


def test_strings_of_gives_every_string_that_is_not_empty():
  assert list(records.strings_of(parse(embedding()))) == ['i', 'q', 'p']
  assert list(records.strings_of(parse({'text': ['u', 'a']}))) == ['u', 'a']


BAD_RECORDS = {
  'not an object': ([1, 2], 'the line: found a list of 2, expected an object'),
  'no field': ({}, 'found no field'),
  'neither kind': ({'a': 1}, 'found "a", expected "query"'),
  'both kinds': (embedding(text='t'), 'found both "query" and "text"'),
  'no query': ({'pos': ['p'], 'neg': []}, '"query" is missing'),
  'no pos': ({'query': 'q', 'neg': []}, '"pos" is missing'),
  'no neg': ({'query': 'q', 'pos': ['p']}, '"neg" is missing; write []'),
  'query null': (embedding(query=None), 'query: found null, expected ['),
  'query of three': (embedding(query=['a', 'b', 'c']), 'query: found a list'),
  'pos a string': (embedding(pos='p'), "pos: found the string 'p'"),
  'pos empty': (embedding(pos=[]), 'pos: found an empty list'),
  'neg an object': (embedding(neg={}), 'neg: found an object'),
  'wrong type deep inside': (
    embedding(neg=['a', 'b', [3, 't']]),
    'neg[2][0]: found the number 3, expected a string',
  ),
  'a boolean inside': (embedding(pos=[['', True]]), 'pos[0][1]: found a bool'),
  'text empty': (embedding(query=['i', '']), 'query[1]: found an empty string'),
  'text blank': (embedding(pos=['p', ' \n']), 'pos[1]: found only blanks'),
  'null character': (embedding(neg=['a\0b']), 'neg[0]: found a null char'),
  'instruction with a null character': (
    embedding(query=['\0', 'q']),
    'query[0]: found a null character at 0',
  ),
  'half a surrogate pair': (embedding(pos=['\ud800']), 'pos[0]: found half a'),
  'text a number': ({'text': 5}, 'text: found the number 5, expected a str'),
  'no turns': ({'text': []}, 'text: found an empty list'),
  'no answer': ({'text': ['u']}, 'text: found 1 turn(s), no answer'),
  'odd turns': ({'text': ['u', 'a', 'u']}, 'text: found 3 turn(s)'),
  'empty answer': ({'text': ['u', 'a', 'u', ' ']}, 'text[3]: found only bl'),
  'turn a list': ({'text': [['u'], 'a']}, 'text[0]: found a list of 1'),
  'empty plain text': ({'text': ''}, 'text: found an empty string'),
}


@pytest.mark.parametrize('name', BAD_RECORDS)
def test_a_bad_record_is_named_with_its_place_and_path(name: str):
  fields, message = BAD_RECORDS[name]
  with pytest.raises(RecordError) as error:
    parse(fields)
  assert str(error.value).startswith('data/a.jsonl:17: ' + message)
  assert '\n' not in str(error.value)


BAD_LINES = {
  'empty': ('', 'the line is empty'),
  'blank': (b' \n', 'the line is empty'),
  'malformed': ('{"text": ', 'not valid JSON: Expecting value at column 10'),
  'two objects': ('{} {}', 'not valid JSON: Extra data'),
  'not UTF-8': (
    b'{"text": "\xff"}',
    'not UTF-8: invalid start byte at byte 10',
  ),
  'nested too deeply': ('[' * 200_000, 'the JSON is nested too deeply'),
}


@pytest.mark.parametrize('name', BAD_LINES)
def test_a_line_that_is_not_json_is_named_with_its_place(name: str):
  line, message = BAD_LINES[name]
  with pytest.raises(RecordError) as error:
    records.parse(line, 'data/a.jsonl:17')
  assert str(error.value).startswith('data/a.jsonl:17: ' + message)
