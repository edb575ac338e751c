"""Tests of how the lines of files are read."""

import gzip
import json
import os
import pathlib
import tracemalloc

import pytest
import zstandard
from etils import epath

from grit_jax.data import lines, records
from grit_jax.data.records import RecordError
from grit_jax.errors import UserError

# What may stand in a text: what ends lines elsewhere, what is written with two
# surrogates, combined, joined, from right to left, or in a plane of its own.
NASTY = (
  'a\u2028b\u2029c\x85d\x0be\x0cf e\u0301 \ufeff 👩\u200d👩\u200d👧 𝒳 שלום'
)
COMPRESS = {
  '.jsonl': lambda data: data,
  '.jsonl.gz': gzip.compress,
  '.jsonl.zst': zstandard.compress,
}


def read(path: pathlib.Path) -> list[bytes]:
  return [line for line, _ in lines.read_lines(epath.Path(path))]


@pytest.mark.parametrize('suffix', COMPRESS)
@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('ascii_only', [False, True])
def test_all_kinds_of_utf8_read_alike(tmp_path, suffix, end, mark, ascii_only):
  texts = [NASTY, 'second', NASTY + NASTY]
  written = [
    json.dumps({'text': text}, ensure_ascii=ascii_only) for text in texts
  ]
  path = tmp_path / f'a{suffix}'
  path.write_bytes(COMPRESS[suffix](mark + end.join(written).encode()))
  assert [records.parse(line, '').turns[0] for line in read(path)] == texts


def test_a_line_longer_than_any_buffer_is_read_whole(tmp_path):
  line = b'x' * (3 << 20)
  for suffix, compress in COMPRESS.items():
    path = tmp_path / f'a{suffix}'
    path.write_bytes(compress(line + b'\n\n' + line))
    assert read(path) == [line, b'', line]


def test_a_line_that_would_fill_the_memory_is_refused_early(tmp_path):
  bomb = b'x\n' + b'0' * (300 << 20)
  for suffix, compress in COMPRESS.items():
    if suffix != '.jsonl':
      path = tmp_path / f'a{suffix}'
      path.write_bytes(compress(bomb))
      tracemalloc.start()
      with pytest.raises(RecordError, match=f'^{path}:2: .* longer than 16 M'):
        read(path)
      _, peak = tracemalloc.get_traced_memory()
      tracemalloc.stop()
      assert peak < 200 << 20, suffix


def test_a_pipe_is_refused_not_waited_for(tmp_path):
  path = tmp_path / 'a.jsonl'
  os.mkfifo(path)
  with pytest.raises(UserError, match=f'^{path}: a pipe, device or socket'):
    read(path)


@pytest.mark.parametrize('suffix', ['.jsonl.gz', '.jsonl.zst'])
def test_members_one_after_the_other_are_one_file(tmp_path, suffix):
  path = tmp_path / f'a{suffix}'
  compress = COMPRESS[suffix]
  path.write_bytes(compress(b'one\ntw') + compress(b'') + compress(b'o\nthree'))
  assert read(path) == [b'one', b'two', b'three']


@pytest.mark.parametrize('suffix', ['.jsonl.gz', '.jsonl.zst'])
def test_a_torn_or_foreign_file_is_named(tmp_path, suffix):
  whole = COMPRESS[suffix](b''.join(b'%d line\n' % i for i in range(9999)))
  path = tmp_path / f'a{suffix}'
  for data in (
    whole[:-1],
    whole[: len(whole) // 2],
    whole[:7],
    b'plain text',
    whole + b'more text',
  ):
    path.write_bytes(data)
    with pytest.raises(RecordError, match=f'^{path}: not a whole (gzip|zstd) '):
      read(path)


@pytest.mark.parametrize(
  'encoding', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-be']
)
def test_another_encoding_is_told(tmp_path, encoding):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "é"}\n', encoding=encoding)
  with pytest.raises(RecordError, match=f'^{path}: the file is UTF-16 or UTF'):
    read(path)


def test_the_place_in_the_file_grows_to_its_size(tmp_path):
  for suffix, compress in COMPRESS.items():
    path = tmp_path / f'a{suffix}'
    path.write_bytes(compress(b'one\ntwo\n'))
    places = [place for _, place in lines.read_lines(epath.Path(path))]
    assert places == sorted(places)
    assert places[-1] == path.stat().st_size
