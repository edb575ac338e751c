"""Lines of text files, plain or compressed, and how far they are read."""

import functools
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard
from etils import epath

from grit_jax.data import records
from grit_jax.data.records import RecordError
from grit_jax.files import check_file

# Of a line, or a document: a few bytes of a compressed file may be any number.
MAX_BYTES = 16 << 20

SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.zst')

_UTF8_MARK = b'\xef\xbb\xbf'
_UTF16_MARKS = (b'\xff\xfe', b'\xfe\xff')
# A compressed block may hold thirty thousand times as much text.
_ZSTD_BLOCK = 1 << 12
# As much as `zstd --long=31` asks for.
_ZSTD_WINDOW = 1 << 31


def suffix_of(name: str) -> str | None:
  """Returns which of `SUFFIXES` a file's name has; None if it has none."""
  return next((s for s in SUFFIXES if name.endswith(s)), None)


def read_lines(path: epath.Path) -> Iterator[tuple[bytes, int]]:
  """Reads the lines of a UTF-8 file, compressed as its name says.

  A line ends in a newline alone: other characters that end lines on paper may
  stand inside a text. A byte order mark at the start of the file is left out.

  Args:
    path: The file, local or gs://.

  Yields:
    A line without its end, and how many bytes of the file have been read.

  Raises:
    RecordError: The file is not whole, or not UTF-8 as a whole, or a line is
      longer than `MAX_BYTES`.
    UserError: It is no regular file.
  """
  check_file(path)
  with path.open('rb') as file:
    try:
      read = functools.partial(
        _decompress(file, path.name).readline, MAX_BYTES + 1
      )
      for number, line in enumerate(iter(read, b''), 1):
        if len(line) > MAX_BYTES:
          raise RecordError(
            f'{path}:{number}: the line is longer than {MAX_BYTES >> 20} MiB; '
            'cut it into several'
          )
        if number == 1:
          line = _check_encoding(line, path)
        yield line.rstrip(b'\r\n'), file.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise RecordError(f'{path}: not a whole gzip file: {error}') from error
    except zstandard.ZstdError as error:
      raise RecordError(f'{path}: not a whole zstd file: {error}') from error


def read_text(path: epath.Path) -> str:
  """Reads a UTF-8 text by the rules of `read_lines`.

  Raises:
    RecordError: As `read_lines`; also the whole is longer than `MAX_BYTES`, or
      a line is no text.
  """
  texts, size = [], 0
  for number, (line, _) in enumerate(read_lines(path), 1):
    where = f'{path}:{number}'
    size += len(line) + 1
    if size > MAX_BYTES + 1:
      raise RecordError(
        f'{path}: the document is longer than {MAX_BYTES >> 20} MiB; cut it '
        'into several'
      )
    text = records.decode(line, where)
    texts.append(records.check_string(text, 'the line', where, blank=True))
  return '\n'.join(texts)


def _decompress(file: BinaryIO, name: str) -> BinaryIO | io.BufferedIOBase:
  if name.endswith('.gz'):
    return gzip.open(file)
  if name.endswith('.zst'):
    return io.BufferedReader(_ZstdFile(file), 1 << 20)
  return file


def _check_encoding(line: bytes, path: epath.Path) -> bytes:
  if line.startswith(_UTF16_MARKS) or b'\0' in line[:4]:
    raise RecordError(
      f'{path}: the file is UTF-16 or UTF-32, expected UTF-8; convert it, as '
      'with `iconv -f UTF-16 -t UTF-8`'
    )
  return line.removeprefix(_UTF8_MARK)


class _ZstdFile(io.RawIOBase):
  """A zstd file's text; unlike the package's own, it raises at a torn end."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self._decompressor = zstandard.ZstdDecompressor(
      max_window_size=_ZSTD_WINDOW
    )
    self._frame: zstandard.ZstdDecompressionObj | None = None
    self._block, self._text = b'', memoryview(b'')

  def readable(self) -> bool:
    return True

  # A writable buffer, for which there is a type from Python 3.12 on.
  def readinto(self, buffer: Any) -> int:
    while not self._text:
      if not self._block:
        self._block = self._file.read(_ZSTD_BLOCK)
        if not self._block:
          if self._frame is not None and not self._frame.eof:
            raise zstandard.ZstdError('it ends in the middle of a frame')
          return 0
      if self._frame is None or self._frame.eof:
        self._frame = self._decompressor.decompressobj()
      self._text = memoryview(self._frame.decompress(self._block))
      self._block = self._frame.unused_data
    count = min(len(buffer), len(self._text))
    buffer[:count] = self._text[:count]
    self._text = self._text[count:]
    return count
