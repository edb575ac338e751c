"""The user's own documents, cut into passages.

A source is a `.txt` or `.md` file, a `.jsonl` file of documents as
`grit_jax.inference.corpus` reads it (also compressed), or a folder, of which
all such files are read. What is longer than a passage may be is cut between
paragraphs; a long paragraph between lines, a long line between words.

Of a folder, what is hidden, leads out of it, or is no regular file is left out
and counted. An image that a text embeds as a data URI is dropped and counted.

A passage knows where it comes from: its id is `notes/plan.md:17`, the file and
the line that it begins in. A document of JSON lines that has an id keeps it,
with the passage's number behind `#` from the second on.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from absl import logging
from etils import epath
from tqdm import tqdm

from grit_jax.data import lines, records
from grit_jax.data.records import RecordError
from grit_jax.data.sources import TRAIN, FileSource
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.files import check_file, check_place, new_file, writing
from grit_jax.inference.corpus import parse_document
from grit_jax.inference.gritlm import join_title
from grit_jax.inference.shards import Document

TEXT_SUFFIXES = ('.txt', '.md')
# Where a text may be cut, the best first: paragraphs, lines, words, characters.
_CUTS = (re.compile(r'\n\s*\n'), re.compile(r'\n'), re.compile(r'\s+'), None)
# Shorter ones may be an example in a text.
_DATA_URI = re.compile(
  r'data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*,[^\s()<>"\']{100,}'
)
# Tokens that a title has to leave for the text.
_LEAST_TEXT = 16


@dataclasses.dataclass(frozen=True)
class Whole:
  """A document before it is cut.

  Attributes:
    name: Its id, or where it stands.
    lines: Whether its passages are called by their lines.
    title: Empty: none.
    text: The text.
  """

  name: str
  lines: bool
  title: str
  text: str


def find_files(sources: Sequence[str | os.PathLike]) -> list[pathlib.Path]:
  """Finds the files to read, those of a folder in the order of their names.

  Raises:
    FileNotFoundError: A source is missing.
    UserError: A source is a pipe, device or socket, is not on a disk, or has a
      name that is not UTF-8.
    RecordError: A file is of no kind that is read, or there is none at all.
  """
  found: list[pathlib.Path] = []
  left_out: collections.Counter[str] = collections.Counter()
  for given in sources:
    check_place(given)
    source = pathlib.Path(given)
    if source.is_dir():
      found += _search(source, left_out)
    elif not source.exists():
      raise FileNotFoundError(f'{source}: there is no such file or folder')
    elif not _is_read(source):
      raise RecordError(
        f'{source}: expected .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst or a '
        'folder of such files'
      )
    else:
      check_file(source)
      found.append(source)
  if not found:
    raise RecordError(f'{", ".join(map(str, sources))}: no documents in there')
  # A file that is named twice, or by itself and in its folder, is read once.
  found = list(dict.fromkeys(found))
  logging.info('%d files are read.', len(found))
  for what, count in sorted((+left_out).items()):
    logging.info('%d left out of the folders: %s.', count, what)
  return found


def _search(
  folder: pathlib.Path, left_out: collections.Counter[str]
) -> Iterator[pathlib.Path]:
  """Yields the files of a folder that are read; counts what is left out."""
  inside = []
  for place, folders, names in os.walk(folder, onerror=_refuse):
    links = [name for name in folders if os.path.islink(f'{place}/{name}')]
    hidden = [name for name in folders if name.startswith('.')]
    left_out['hidden'] += len(hidden)
    folders[:] = set(folders) - {*links, *hidden}
    links = [name for name in links if name not in hidden]
    inside += [pathlib.Path(place, name) for name in names + links]
  root = os.path.realpath(folder)
  for path in sorted(inside):
    if path.name.startswith('.'):
      left_out['hidden'] += 1
    elif path.is_dir() or not _is_below(path, root):
      left_out['links to folders or out of them'] += 1
    elif not path.is_file():
      left_out['pipes, devices, sockets or broken links'] += 1
    elif not _is_read(path):
      left_out['of other kinds'] += 1
    else:
      check_place(path)
      yield path


def _is_below(path: pathlib.Path, root: str) -> bool:
  return pathlib.Path(os.path.realpath(path)).is_relative_to(root)


def _refuse(error: OSError) -> NoReturn:
  raise error


def _is_read(path: pathlib.Path) -> bool:
  return path.suffix in TEXT_SUFFIXES or lines.suffix_of(path.name) is not None


def read_documents(path: pathlib.Path) -> Iterator[Whole]:
  """Reads the documents of a file.

  Raises:
    RecordError: It is not UTF-8, too long, or a line is no document.
  """
  if path.suffix in TEXT_SUFFIXES:
    text = lines.read_text(epath.Path(path))
    yield Whole(str(path), True, path.name, text)
    return
  source = FileSource(path)
  for line in source.read(held_out_fraction=0.0):
    where = source.where(TRAIN, line.number)
    document = parse_document(line.json, where, line.number - 1)
    fields = records.parse_json(line.json, where)
    named = isinstance(fields, dict) and any(
      fields.get(name) is not None for name in ('id', '_id')
    )
    name = document['id'] if named else where
    yield Whole(name, False, document.get('title', ''), document['text'])


def write_passages(
  files: Sequence[pathlib.Path],
  target: pathlib.Path,
  tokenizer: Tokenizer,
  max_length: int,
  prefix: str,
) -> list[int]:
  """Cuts documents into passages, and writes them as a corpus.

  Args:
    files: What `find_files` found.
    target: A `.jsonl` file, which is replaced as a whole.
    tokenizer: It counts.
    max_length: Tokens of a passage at most, as it is encoded: with its title
      and the prefix.
    prefix: What stands before it.

  Returns:
    The tokens of each passage, in order.

  Raises:
    RecordError: Two documents have one id, a title is too long, or there is no
      text at all.
    UserError: The disk is full.
  """
  lengths: list[int] = []
  seen: dict[str, pathlib.Path] = {}
  counts: collections.Counter[str] = collections.Counter()
  with writing(target.parent):
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target, 'w', encoding='utf-8') as file:
      for path in tqdm(files, desc='Reading', unit=' files'):
        for document in read_documents(path):
          text, count = _DATA_URI.subn('', document.text)
          document = dataclasses.replace(document, text=text)
          counts['documents'] += 1
          counts['images'] += count
          counts['blank'] += not document.text.strip()
          for passage, length in cut(document, tokenizer, max_length, prefix):
            name = passage['id']
            if name in seen:
              raise RecordError(
                f'{path}: the id {name!r} is also that of a document of '
                f'{seen[name]}'
              )
            seen[name] = path
            line = json.dumps(passage, ensure_ascii=False)
            file.write(f'{line}\n')
            lengths.append(length)
  if not lengths:
    raise RecordError(f'{files[0]}: no text in it, nor in the other files')
  logging.info(
    '%d documents are %d passages of %d tokens in all; %d documents are blank, '
    'and left out; %d embedded data URIs are dropped.',
    counts['documents'], len(lengths), sum(lengths), counts['blank'],
    counts['images'],
  )  # fmt: skip
  return lengths


def cut(
  document: Whole, tokenizer: Tokenizer, max_length: int, prefix: str
) -> list[tuple[Document, int]]:
  """Cuts a document into passages; a blank one gives none.

  Returns:
    The passages, and the tokens that each is encoded as.

  Raises:
    RecordError: The title leaves no room.
  """
  title = {'title': document.title} if document.title.strip() else {}

  def count(texts: Sequence[str]) -> list[int]:
    parts = [(prefix, join_title({**title, 'text': text})) for text in texts]
    return [len(ids) for ids, _ in tokenizer.encode_parts_batch(parts)]

  (around,) = count([''])
  budget = max_length - around
  while True:
    if budget < _LEAST_TEXT:
      raise RecordError(
        f'{document.name}: its title and the format take {around} of '
        f'max_length={max_length} tokens, and leave too few for a text'
      )
    spans = _cut(document.text, (0, len(document.text)), tokenizer, budget, 0)
    texts = [document.text[start:stop] for start, stop in spans]
    lengths = count([text.strip() for text in texts])
    longest = max(lengths, default=0)
    if longest <= max_length:
      break
    # Joined, parts may have a token more than each by itself.
    budget -= longest - max_length
  passages = []
  for (start, _), text, length in zip(spans, texts, lengths, strict=True):
    if text.strip():
      start += len(text) - len(text.lstrip())
      passages.append((start, text.strip(), length))
  names = _name(document, [start for start, _, _ in passages])
  return [
    ({'id': name, **title, 'text': text}, length)
    for name, (_, text, length) in zip(names, passages, strict=True)
  ]


def _cut(
  text: str,
  span: tuple[int, int],
  tokenizer: Tokenizer,
  budget: int,
  level: int,
) -> list[tuple[int, int]]:
  """Cuts a span of a text into spans of at most `budget` tokens."""
  parts = _split(text, span, level)
  counts = tokenizer.encode_batch([text[start:stop] for start, stop in parts])
  spans: list[tuple[int, int]] = []
  room = 0
  for (start, stop), ids in zip(parts, counts, strict=True):
    if len(ids) > budget and stop - start > 1:
      finer = min(level + 1, len(_CUTS) - 1)
      spans += _cut(text, (start, stop), tokenizer, budget, finer)
      room = 0
    elif len(ids) <= room:
      spans[-1] = (spans[-1][0], stop)
      room -= len(ids)
    else:
      spans.append((start, stop))
      room = budget - len(ids)
  return spans


def _split(
  text: str, span: tuple[int, int], level: int
) -> list[tuple[int, int]]:
  """Splits a span at one of `_CUTS`, which stays with what is before it."""
  start, stop = span
  cut = _CUTS[level]
  if cut is None:
    # In halves, again and again: a token a character would fill the memory.
    middle = (start + stop) // 2
    return [(start, middle), (middle, stop)]
  ends = [match.end() for match in cut.finditer(text, start, stop)]
  bounds = sorted({start, *ends, stop})
  return list(zip(bounds, bounds[1:], strict=False))


def _name(document: Whole, starts: Sequence[int]) -> list[str]:
  """Returns the ids of passages that begin at these places of the text."""
  if not document.lines:
    others = [f'{document.name}#{i}' for i in range(2, len(starts) + 1)]
    return [document.name, *others][: len(starts)]
  names, line, before = [], 1, 0
  counts: collections.Counter[int] = collections.Counter()
  for start in starts:
    line += document.text.count('\n', before, start)
    before = start
    counts[line] += 1
    again = f'#{counts[line]}' if counts[line] > 1 else ''
    names.append(f'{document.name}:{line}{again}')
  return names
