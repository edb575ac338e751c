import json

import pytest

from grit_jax.data.records import RecordError
from grit_jax.data.sources import FileSource
from grit_jax.data.tokenizer import make_tokenizer
from grit_jax.inference.corpus import read_documents as read_corpus
from grit_jax.rag.documents import find_files, write_passages

LENGTH = 60
NOTES = (
  '# Notes\n\nThe first paragraph is short.\n\n'
  + ' '.join(f'word{i}' for i in range(80))
  + '\n\n\n'
  + '\n'.join(f'line {i} of a list of many lines' for i in range(12))
  + '\n\nThe end. '
  + 'x' * 300
  + '\n'
)


@pytest.fixture(scope='session')
def tokenizer(tokenizer_model):
  return make_tokenizer({'tokenizer.model': tokenizer_model}, 'tokenizer')


def write(sources, target, tokenizer, max_length=LENGTH):
  lengths = write_passages(
    find_files(sources), target, tokenizer, max_length, '<s><|embed|>\n'
  )
  return lengths, [d for _, d in read_corpus(FileSource(target))]


def test_passages_are_the_whole_text_in_order_and_fit(tmp_path, tokenizer):
  path = tmp_path / 'notes.md'
  path.write_text(NOTES)
  lengths, passages = write([path], tmp_path / 'out.jsonl', tokenizer)
  joined = ''.join(passage['text'] for passage in passages)
  assert ''.join(joined.split()) == ''.join(NOTES.split())
  for length, passage in zip(lengths, passages, strict=True):
    text = f'<s><|embed|>\nnotes.md {passage["text"]}'
    assert length == len(tokenizer.encode(text)) <= LENGTH
  assert len(passages) > 10


def test_ids_name_the_file_and_the_line(tmp_path, tokenizer):
  path = tmp_path / 'notes.md'
  path.write_text(NOTES)
  _, passages = write([path], tmp_path / 'out.jsonl', tokenizer)
  names = [passage['id'] for passage in passages]
  assert len(set(names)) == len(names)
  lines = NOTES.split('\n')
  for passage in passages:
    line = int(passage['id'].removeprefix(f'{path}:').split('#')[0])
    assert passage['text'].split('\n')[0] in lines[line - 1]
  # Several passages are of the long line, and of the long word.
  assert f'{path}:5#2' in names


def test_paragraphs_stay_whole_where_they_fit(tmp_path, tokenizer):
  path = tmp_path / 'a.txt'
  path.write_text('\n\n'.join(f'Paragraph {i} is this.' for i in range(20)))
  _, passages = write([path], tmp_path / 'out.jsonl', tokenizer)
  assert 1 < len(passages) < 20
  for passage in passages:
    assert passage['text'].startswith('Paragraph')
    assert passage['text'].endswith('this.')


def test_folders_and_json_lines_are_read_and_the_rest_left(tmp_path, tokenizer):
  place = tmp_path / 'docs'
  (place / 'deep').mkdir(parents=True)
  (place / 'deep' / 'b.txt').write_text('Second.')
  (place / 'a.md').write_text('First.')
  (place / 'picture.png').write_bytes(b'\x89PNG')
  (place / 'blank.txt').write_text(' \n')
  rows = [{'_id': 'q7', 'title': 'T', 'text': 'Third. ' * 40}, 'A string.']
  (place / 'c.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  _, passages = write([place, place / 'a.md'], tmp_path / 'o.jsonl', tokenizer)
  names = [passage['id'].removeprefix(f'{place}/') for passage in passages]
  assert names == [
    'a.md:1', 'q7', 'q7#2', *(f'q7#{i}' for i in range(3, len(names) - 2)),
    'c.jsonl:2', 'deep/b.txt:1',
  ]  # fmt: skip
  assert passages[1]['title'] == 'T'
  assert passages[0] == {
    'id': f'{place}/a.md:1', 'title': 'a.md', 'text': 'First.'
  }  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.pdf', b'text', r'a\.pdf: expected \.txt'),
    ('a.txt', b'caf\xe9 au lait', 'a.txt: not UTF-8: .* at byte 3'),
    ('a.txt', b' \n', 'a.txt: no text in it'),
    ('a.jsonl', b'{"title": "x"}\n', 'a.jsonl:1: "text" is missing'),
    (
      'a.jsonl',
      b'{"id": "1", "text": "x"}\n{"id": 1, "text": "y"}\n',
      "a.jsonl: the id '1' is also that of a document of .*a.jsonl",
    ),
    (f'{"long" * 30}.txt', b'text', 'title and the format take .* of max_len'),
  ],
)
def test_faults_are_named(tmp_path, tokenizer, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(RecordError, match=message):
    write([tmp_path / name], tmp_path / 'out' / 'o.jsonl', tokenizer)


def test_a_missing_source_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere: there is no such'):
    find_files([tmp_path / 'nowhere'])
