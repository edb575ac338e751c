"""Tokenizers, read the way the base models were trained with them.

There are two kinds. A sentencepiece model (`tokenizer.model`) is what the
models of Mistral and Llama 2 come with; a `tokenizer.json` is what Llama 3 and
most others come with, and the `tokenizers` library reads it.

Both take the literals of special tokens in a text for the tokens, add nothing
of their own, and say which tokens belong to which part of a text. That must
come from the tokenizer: the string is tokenized as a whole, and a tokenizer
may merge the end of one part with the start of the next.
"""

import abc
import bisect
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from grit_jax.errors import UserError
from grit_jax.files import check_file, check_place

# The literals of a sentencepiece model; a `tokenizer.json` has its own.
BOS = '<s>'
EOS = '</s>'

# Llama 3's own file of that name: a piece in Base64 and its rank, a line.
_LLAMA3 = re.compile(rb'[A-Za-z0-9+/]+=* \d+\n')
SENTENCEPIECE_FILE = 'tokenizer.model'
JSON_FILE = 'tokenizer.json'
CONFIG_FILE = 'tokenizer_config.json'
# Where older folders name the special tokens.
SPECIAL_TOKENS_FILE = 'special_tokens_map.json'

# Tokens of a prefix that are decoded with what follows it, at first.
_CONTEXT = 8

# What the prompt format is made of has to survive.
_PROBE = 'a\n\n b\n'


class TokenizerError(UserError):
  """A tokenizer that cannot be used, or not be trained."""


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Attributes:
    files: The files that `make_tokenizer` builds it from again, by name.
    fingerprint: SHA-256 of the files in hexadecimal.
    vocab_size: 1 + the largest id V; ids are in [0, V).
    bos: Id of the token that begins a text.
    eos: Id of the token that ends one.
    bos_piece: The literal of `bos`, such as `<s>` or `<|begin_of_text|>`.
    eos_piece: The literal of `eos`.
    unk: Id of the unknown token; None if there is none.
  """

  vocab_size: int
  bos: int
  eos: int
  bos_piece: str
  eos_piece: str
  unk: int | None

  def __init__(self, files: Mapping[str, bytes]):
    """Keeps the files.

    Args:
      files: The files that the tokenizer is built from, by name.
    """
    self.files = dict(files)
    content = b''.join(self.files[name] for name in sorted(self.files))
    self.fingerprint = hashlib.sha256(content).hexdigest()

  def __reduce__(self) -> tuple:
    """Pickles the files."""
    return make_tokenizer, (self.files, 'tokenizer')

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Encodes one text.

    Args:
      text: Any text; the literals of special tokens in it are those tokens.

    Returns:
      Its ids. Nothing is added: BOS stands where the text has its literal.
    """

  @abc.abstractmethod
  def encode_batch(
    self, texts: Sequence[str], num_threads: int = -1
  ) -> list[list[int]]:
    """Encodes many texts in parallel.

    Args:
      texts: The texts.
      num_threads: Threads to use; -1 for one a core.

    Returns:
      For each text what `encode` gives.
    """

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """Decodes ids into text.

    Args:
      ids: Token ids, each in [0, V).

    Returns:
      The text; special tokens give nothing.
    """

  def decode_after(
    self, prefix: Sequence[int] | np.ndarray, ids: Sequence[int] | np.ndarray
  ) -> str:
    """Decodes the text that ids add to a prefix.

    A token by itself does not tell its text: sentencepiece drops the blank
    before the first one, and one character may be the bytes of several tokens.

    Args:
      prefix: Token ids before `ids`; its last ones are decoded too.
      ids: Token ids, each in [0, V).

    Returns:
      The decoded text of both, less that of `prefix`. A character that begins
      in `prefix` and ends in `ids` is in it.
    """
    size = _CONTEXT
    context = list(prefix[-size:])
    # Too short is a context without a character, or one that begins within one.
    while size < len(prefix) and self.decode(context)[:1] in ('', '\ufffd'):
      size *= 2
      context = list(prefix[-size:])
    before = self.decode(context)
    whole = self.decode([*context, *ids])
    # Where `prefix` ends within a character, `before` is no prefix of `whole`.
    return whole[len(os.path.commonprefix([before, whole])) :]

  @abc.abstractmethod
  def _encode_with_ends(
    self, batch: Sequence[Sequence[str]], num_threads: int
  ) -> list[tuple[np.ndarray, list[int]]]:
    """Returns of each text the ids, and how many begin before each part's end.

    The ids are int32 [T], and the last number is T.
    """

  def encode_parts_batch(
    self, batch: Sequence[Sequence[str]], num_threads: int = -1
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encodes texts that are given in parts, and says whose each token is.

    What is tokenized is the parts joined, never a part by itself. A token
    belongs to the part in which its first character lies. So one that reaches
    over a boundary counts for the part before it, as in the reference, which
    counts the tokens of what stands before the boundary.

    Args:
      batch: The parts of each text; a part may be empty.
      num_threads: As of `encode_batch`.

    Returns:
      For each text the ids, int32 [T], which are those of the joined string,
      and the number of the part of each token, int32 [T], never falling.

    Raises:
      ValueError: The tokenizer cannot tell where a part ends; see
        `SentencePieceTokenizer`.
    """
    encoded = []
    for parts, (ids, ends) in zip(
      batch, self._encode_with_ends(batch, num_threads), strict=True
    ):
      numbers = np.arange(len(parts), dtype=np.int32)
      encoded.append((ids, np.repeat(numbers, np.diff([0, *ends]))))
    return encoded

  def encode_parts(self, parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes one text that is given in parts; see `encode_parts_batch`.

    Args:
      parts: The parts.

    Returns:
      The ids, int32 [T], and the number of each token's part, int32 [T].
    """
    return self.encode_parts_batch([parts])[0]


class SentencePieceTokenizer(Tokenizer):
  """A sentencepiece model.

  The special tokens `<s>`, `</s>` and `<unk>` count as such wherever their
  literals stand in a text, and everything between two of them is encoded by
  itself, with a dummy prefix of its own. sentencepiece alone would spell the
  literals out, and would give the dummy prefix to the first word only.

  No piece holds a newline, so every newline of a text is one token. That is
  how the parts of a text are told apart, without the positions of tokens:
  every part but the last has to be empty or end in a newline or in `</s>`. The
  token of a dummy prefix belongs to the part after the `</s>`.

  Attributes:
    newline: Id of the token of a newline.
  """

  unk: int

  def __init__(self, model: bytes, where: str = 'tokenizer'):
    """Builds the tokenizer.

    Args:
      model: A serialized sentencepiece model.
      where: What to call it in error messages, such as its path.

    Raises:
      TokenizerError: The bytes are no sentencepiece model, or one that the
        prompt format cannot be written in.
    """
    super().__init__({SENTENCEPIECE_FILE: model})
    processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
      raise TokenizerError(f'{where}: not a sentencepiece model') from error
    self.vocab_size = processor.get_piece_size()
    self.bos, self.bos_piece = processor.bos_id(), BOS
    self.eos, self.eos_piece = processor.eos_id(), EOS
    self.unk = processor.unk_id()
    self._processor = processor
    pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
    for name, literal, index in ('bos', BOS, self.bos), ('eos', EOS, self.eos):
      if index < 0:
        raise TokenizerError(f'{where}: the model has no {name} token')
      if pieces[index] != literal:
        raise TokenizerError(
          f'{where}: the {name} token is {pieces[index]!r}, expected '
          f'{literal!r} of a sentencepiece model'
        )
    for index, piece in enumerate(pieces):
      if '\n' in piece:
        raise TokenizerError(
          f'{where}: piece {index} is {piece!r}; with a newline inside a '
          'piece, a prefix is not tokenized the same with and without the '
          'text that follows it'
        )
    self._literals = {pieces[i]: i for i in (self.unk, self.bos, self.eos)}
    self._splitter = re.compile(
      '(' + '|'.join(re.escape(literal) for literal in self._literals) + ')'
    )
    self.newline = processor.piece_to_id('<0x0A>')
    if self.decode(self.encode(_PROBE)) != _PROBE:
      raise TokenizerError(
        f'{where}: the model does not keep newlines (by byte fallback, without '
        'normalisation), which the prompt format is made of'
      )

  def encode(self, text: str) -> list[int]:
    """See the base class."""
    ids = []
    for piece in self._splitter.split(text):
      if piece in self._literals:
        ids.append(self._literals[piece])
      elif piece:
        ids.extend(self._processor.encode(piece))
    return ids

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = -1
  ) -> list[list[int]]:
    """See the base class."""
    split = [self._splitter.split(text) for text in texts]
    plain = [
      piece
      for pieces in split
      for piece in pieces
      if piece and piece not in self._literals
    ]
    encoded = iter(self._processor.encode(plain, num_threads=num_threads))
    batch = []
    for pieces in split:
      ids = []
      for piece in pieces:
        if piece in self._literals:
          ids.append(self._literals[piece])
        elif piece:
          ids.extend(next(encoded))
      batch.append(ids)
    return batch

  def decode(self, ids: Sequence[int]) -> str:
    """See the base class; a blank at the very start, too, gives nothing.

    The dummy prefix looks like one.
    """
    return self._processor.decode([int(i) for i in ids])

  def can_write(self, piece: str) -> bool:
    """Says whether a text that holds `piece` is encoded to its token.

    Args:
      piece: The literal of a token.

    Returns:
      Whether it is `<s>`, `</s>`, `<unk>` or in the vocabulary; control tokens
      other than these are spelled out.
    """
    index = self._processor.piece_to_id(piece)
    return piece in self._literals or not (
      self._processor.is_unknown(index) or self._processor.is_control(index)
    )

  def _encode_with_ends(
    self, batch: Sequence[Sequence[str]], num_threads: int
  ) -> list[tuple[np.ndarray, list[int]]]:
    encoded = []
    texts = [''.join(parts) for parts in batch]
    all_ids = self.encode_batch(texts, num_threads)
    for parts, ids in zip(batch, all_ids, strict=True):
      array = np.array(ids, np.int32)
      encoded.append((array, self._find_ends(parts, array)))
    return encoded

  def _find_ends(self, parts: Sequence[str], ids: np.ndarray) -> list[int]:
    newline_ends = np.flatnonzero(ids == self.newline) + 1
    eos_ends = np.flatnonzero(ids == self.eos) + 1
    ends: list[int] = []
    newlines = eos = 0
    for part in parts[:-1]:
      newlines += part.count('\n')
      # The data may itself contain the literal, which is then the token.
      eos += part.count(EOS)
      if part.endswith('\n'):
        ends.append(int(newline_ends[newlines - 1]))
      elif part.endswith(EOS):
        ends.append(int(eos_ends[eos - 1]))
      elif not part:
        ends.append(ends[-1] if ends else 0)
      else:
        raise ValueError(
          f'the part {part[-20:]!r} ends neither in a newline nor in {EOS!r}'
        )
    return [*ends, len(ids)] if parts else ends


class JsonTokenizer(Tokenizer):
  """A `tokenizer.json`, read by the `tokenizers` library.

  The parts of a text are told apart by the positions of tokens. Where several
  tokens share a character, as the bytes of one do, all begin at it.
  """

  def __init__(self, files: Mapping[str, bytes], where: str = 'tokenizer'):
    """Builds the tokenizer.

    Args:
      files: `tokenizer.json`, and `tokenizer_config.json` or
        `special_tokens_map.json`, which say what BOS and EOS are. Of these two
        only that much is kept.
      where: What to call it in error messages, such as its path.

    Raises:
      TokenizerError: `tokenizer.json` is no tokenizer, or one that the prompt
        format cannot be written in; or BOS or EOS is missing.
    """
    special = _read_special_tokens(files, where)
    config = json.dumps(special, indent=2, sort_keys=True).encode()
    super().__init__({JSON_FILE: files[JSON_FILE], CONFIG_FILE: config})
    self._tokenizer = _parse_tokenizer(files[JSON_FILE], where)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    # Besides the special tokens that it would add, which are not wanted, it
    # takes the leading blanks of tokens out of their positions.
    self._tokenizer.post_processor = tokenizers.processors.Sequence([])
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.bos_piece, self.eos_piece = special['bos_token'], special['eos_token']
    for name, piece in ('bos', self.bos_piece), ('eos', self.eos_piece):
      if piece not in vocabulary:
        raise TokenizerError(
          f'{where}: the {name} token {piece!r} is not in the vocabulary'
        )
      index = vocabulary[piece]
      if index not in self.encode(f'a{piece}b') or self.decode([index]):
        raise TokenizerError(
          f'{where}: the {name} token {piece!r} is not found wherever a text '
          'has it and left out when decoding, as special tokens are'
        )
    self.bos = vocabulary[self.bos_piece]
    self.eos = vocabulary[self.eos_piece]
    unk = special.get('unk_token')
    self.unk = None if unk is None else vocabulary.get(unk)
    self.vocab_size = 1 + max(vocabulary.values())
    found = self.decode(self.encode(_PROBE))
    if found != _PROBE:
      raise TokenizerError(
        f'{where}: {_PROBE!r} comes back as {found!r}; the prompt format needs '
        'newlines and blanks to be kept'
      )

  def encode(self, text: str) -> list[int]:
    """See the base class."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(
    self, texts: Sequence[str], num_threads: int = -1
  ) -> list[list[int]]:
    """See the base class; other than 1 thread is as many as the library has."""
    if num_threads == 1:
      return [self.encode(text) for text in texts]
    encoded = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encoded]

  def decode(self, ids: Sequence[int]) -> str:
    """See the base class."""
    return self._tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=True
    )

  def _encode_with_ends(
    self, batch: Sequence[Sequence[str]], num_threads: int
  ) -> list[tuple[np.ndarray, list[int]]]:
    encoded = []
    texts = [''.join(parts) for parts in batch]
    if num_threads == 1:
      encodings = [
        self._tokenizer.encode(text, add_special_tokens=False) for text in texts
      ]
    else:
      encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    for parts, encoding in zip(batch, encodings, strict=True):
      # Pairs of the first character and the one after the last, in order.
      offsets = encoding.offsets
      ends = [
        bisect.bisect_left(offsets, (end,))
        for end in itertools.accumulate(map(len, parts))
      ]
      # Also where a token stands for no character, behind the last one.
      ends[-1:] = [len(offsets)] if parts else []
      encoded.append((np.array(encoding.ids, np.int32), ends))
    return encoded


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
  """Reads the tokenizer of a base model.

  Args:
    path: A sentencepiece model, a `tokenizer.json`, beside which
      `tokenizer_config.json` lies, or a folder as Hugging Face publishes it;
      local or gs://. Of a folder that has both, the sentencepiece model is
      taken, unless it is of Llama 3's format or `tokenizer.json` has more
      tokens.

  Returns:
    The tokenizer.

  Raises:
    FileNotFoundError: There is no such file or folder.
    TokenizerError: There is no usable tokenizer.
  """
  check_place(path)
  path = epath.Path(path)
  if path.is_dir():
    return _load_folder(path)
  if path.suffix == '.json':
    return _load_json(path)
  return SentencePieceTokenizer(_read(path), str(path))


def make_tokenizer(files: Mapping[str, bytes], where: str) -> Tokenizer:
  """Builds a tokenizer from the contents of its files.

  Args:
    files: What `Tokenizer.files` holds.
    where: What to call it in error messages.

  Returns:
    The tokenizer.

  Raises:
    TokenizerError: The files are no usable tokenizer.
  """
  if SENTENCEPIECE_FILE in files:
    return SentencePieceTokenizer(files[SENTENCEPIECE_FILE], where)
  if JSON_FILE in files:
    return JsonTokenizer(files, where)
  raise TokenizerError(
    f'{where}: found {sorted(files)}, expected {SENTENCEPIECE_FILE} or '
    f'{JSON_FILE}'
  )


def _load_folder(folder: epath.Path) -> Tokenizer:
  model, json_file = folder / SENTENCEPIECE_FILE, folder / JSON_FILE
  if not model.exists():
    if not json_file.exists():
      raise TokenizerError(
        f'{folder}: no tokenizer; looked for {SENTENCEPIECE_FILE} and '
        f'{JSON_FILE}'
      )
    return _load_json(json_file)
  if not json_file.exists():
    return SentencePieceTokenizer(_read(model), str(model))
  data = _read(model)
  if _LLAMA3.match(data):
    return _load_json(json_file)
  tokenizer = SentencePieceTokenizer(data, str(model))
  published = _parse_tokenizer(_read(json_file), str(json_file))
  added = published.get_added_tokens_decoder().values()
  if all(tokenizer.can_write(token.content) for token in added):
    return tokenizer
  return _load_json(json_file)


def _read(path: epath.Path) -> bytes:
  check_file(path)
  return path.read_bytes()


def _load_json(path: epath.Path) -> JsonTokenizer:
  files = {JSON_FILE: _read(path)}
  for name in CONFIG_FILE, SPECIAL_TOKENS_FILE:
    if (path.parent / name).exists():
      files[name] = _read(path.parent / name)
  return JsonTokenizer(files, str(path))


def _read_special_tokens(
  files: Mapping[str, bytes], where: str
) -> dict[str, str]:
  """Returns the literals of bos_token, eos_token and, if any, unk_token."""
  found = {}
  for name in SPECIAL_TOKENS_FILE, CONFIG_FILE:
    if name in files:
      fields = _parse_object(files[name], f'{where}: {name}')
      for key in 'bos_token', 'eos_token', 'unk_token':
        token = fields.get(key)
        literal = token.get('content') if isinstance(token, dict) else token
        if isinstance(literal, str):
          found[key] = literal
  for name in 'bos', 'eos':
    if f'{name}_token' not in found:
      raise TokenizerError(
        f'{where}: neither {CONFIG_FILE} nor {SPECIAL_TOKENS_FILE} beside it '
        f'names a {name} token'
      )
  return found


def _parse_tokenizer(data: bytes, where: str) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_buffer(data)
  except Exception as error:  # The library raises nothing narrower.
    raise TokenizerError(f'{where}: not a tokenizer.json: {error}') from error


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
  try:
    fields = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise TokenizerError(f'{where}: not JSON: {error}') from error
  if not isinstance(fields, dict):
    raise TokenizerError(f'{where}: not a JSON object')
  return fields
