import json
import logging
import os
import socket

import pytest

from grit_jax.data.sources import FileSource
from grit_jax.data.tokenizer import make_tokenizer
from grit_jax.errors import UserError
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
    ('a.txt', b'caf\xe9 au lait', 'a.txt:1: not UTF-8: .* at byte 3'),
    ('a.md', b'one\n\0two', 'a.md:2: .* null character at 0'),
    ('a.txt', 'text'.encode('utf-16'), 'a.txt: the file is UTF-16'),
    ('a.txt', b'x' * (16 << 20) + b'x', 'a.txt:1: the line is longer than 16'),
    (
      'a.txt',
      (b'x' * 999 + b'\n') * 17_000,
      'a.txt: the document is longer than',
    ),
    (b'caf\xe9.txt', b'text', r'caf\\udce9.txt.: the name is not UTF-8'),
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
  name = os.fsdecode(name)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    write([tmp_path / name], tmp_path / 'out' / 'o.jsonl', tokenizer)


def test_what_is_hidden_elsewhere_or_no_file_is_left_out_and_counted(
  tmp_path, caplog, monkeypatch
):
  place, outside = tmp_path / '.docs', tmp_path / 'outside'
  for folder in place / '.git', place / 'deep', outside:
    folder.mkdir(parents=True)
    (folder / 'a.txt').write_text('Text.')
  (place / '.git' / 'b.txt').write_text('Text.')
  (place / '._a.md').write_bytes(b'\0\5\x16\7')
  (place / 'inside.txt').symlink_to('deep/a.txt')
  (place / 'outside.txt').symlink_to(outside / 'a.txt')
  (place / 'outside').symlink_to(outside)
  (place / 'loop.txt').symlink_to('loop.txt')
  (place / 'broken.txt').symlink_to('nowhere.txt')
  (place / 'device.txt').symlink_to('/dev/zero')
  os.mkfifo(place / 'pipe.txt')
  with socket.socket(socket.AF_UNIX) as server:
    monkeypatch.chdir(place)  # The path of a socket is at most 107 bytes.
    server.bind('socket.txt')
  (place / 'image.png').write_bytes(b'\x89PNG')
  with caplog.at_level(logging.INFO):
    found = find_files([place])
  assert found == [place / 'deep' / 'a.txt', place / 'inside.txt']
  left_out = [m for m in caplog.messages if 'left out' in m]
  assert left_out == [
    '2 left out of the folders: hidden.',
    '3 left out of the folders: links to folders or out of them.',
    '1 left out of the folders: of other kinds.',
    '4 left out of the folders: pipes, devices, sockets or broken links.',
  ]


@pytest.mark.parametrize('kind', ['pipe', 'device'])
def test_a_source_that_is_no_file_is_named(tmp_path, kind):
  path = tmp_path / 'a.txt'
  if kind == 'pipe':
    os.mkfifo(path)
  else:
    path.symlink_to('/dev/zero')
  with pytest.raises(UserError, match='a.txt: a pipe, device or socket'):
    find_files([path])


def test_embedded_images_and_marks_are_dropped(tmp_path, tokenizer):
  path = tmp_path / 'a.md'
  image = f'![tower](data:image/png;base64,{"QUJD" * 100_000}=)'
  short = 'Write data:text/plain,hello for a text.'
  path.write_text(f'First.\n\n{image}\n\n{short}', encoding='utf-8-sig')
  lengths, passages = write([path], tmp_path / 'o.jsonl', tokenizer, 100)
  text = '\n\n'.join(['First.', '![tower]()', short])
  assert [passage['text'] for passage in passages] == [text]
  assert passages[0]['id'] == f'{path}:1'


def test_a_long_word_is_cut_without_a_call_a_character(tmp_path, tokenizer):
  """Each character by itself took 600 bytes."""
  text = 'x' * 100_000
  (tmp_path / 'a.txt').write_text(text)
  counted = []

  class Counting:
    def encode_batch(self, texts):
      counted.extend(texts)
      return tokenizer.encode_batch(texts)

    def encode_parts_batch(self, parts):
      return tokenizer.encode_parts_batch(parts)

  _, passages = write([tmp_path / 'a.txt'], tmp_path / 'o.jsonl', Counting())
  assert ''.join(passage['text'] for passage in passages) == text
  assert len(counted) < len(text) / 4


def test_a_missing_source_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere: there is no such'):
    find_files([tmp_path / 'nowhere'])
