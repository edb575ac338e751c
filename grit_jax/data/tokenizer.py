"""A sentencepiece model, read the way the base models were trained with it.

The special tokens `<s>`, `</s>` and `<unk>` count as such wherever their
literals stand in a text, and everything between two of them is encoded by
itself, with a dummy prefix of its own. sentencepiece alone would spell the
literals out, and would give the dummy prefix to the first word only.
"""

import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Sequence

import sentencepiece
from etils import epath

BOS = '<s>'
EOS = '</s>'

# Enough for 8192 pieces of source text or prose; a tokenizer for a larger
# vocabulary comes with its base model and is not trained here.
MAX_TRAINING_CHARACTERS = 6_000_000
# So that one long document cannot be the whole sample.
MAX_CHARACTERS_A_TEXT = 20_000


class TokenizerError(ValueError):
  """A sentencepiece model that cannot be used, or not be trained."""


class Tokenizer:
  """Text to ids and back, by one sentencepiece model.

  Encoding is exact where prompt formats need it: no piece holds a newline, so
  every newline of a text is one token, `newline`, and the tokens of a prefix
  that ends in a newline do not depend on what follows.

  Attributes:
    model_bytes: The serialized sentencepiece model.
    vocab_size: Number of pieces V; ids are in [0, V).
    bos: Id of `<s>`.
    eos: Id of `</s>`.
    unk: Id of the unknown token.
    newline: Id of the token of a newline.
    fingerprint: SHA-256 of `model_bytes` in hexadecimal.
  """

  def __init__(self, model_bytes: bytes, where: str = 'tokenizer'):
    """Builds the tokenizer.

    Args:
      model_bytes: A serialized sentencepiece model.
      where: What to call the model in error messages, such as its path.

    Raises:
      ValueError: The bytes are no sentencepiece model, or one that the prompt
        format cannot be written in.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(model_bytes)
    except RuntimeError as error:
      raise TokenizerError(f'{where}: not a sentencepiece model') from error
    self.model_bytes = model_bytes
    self.vocab_size = processor.get_piece_size()
    self.bos = processor.bos_id()
    self.eos = processor.eos_id()
    self.unk = processor.unk_id()
    self.fingerprint = hashlib.sha256(model_bytes).hexdigest()
    self._processor = processor
    pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
    for name, literal, index in ('bos', BOS, self.bos), ('eos', EOS, self.eos):
      if index < 0:
        raise TokenizerError(f'{where}: the model has no {name} token')
      if pieces[index] != literal:
        raise TokenizerError(
          f'{where}: the {name} token is {pieces[index]!r}, but the prompt '
          f'format writes {literal!r}'
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
    text = 'a\n\n b\n'
    if self.decode(self.encode(text)) != text:
      raise TokenizerError(
        f'{where}: the model does not keep newlines (by byte fallback, without '
        'normalisation), which the prompt format is made of'
      )

  @classmethod
  def load(cls, path: epath.PathLike) -> 'Tokenizer':
    """Reads a `tokenizer.model` file.

    Args:
      path: The file, local or gs://.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It holds no usable sentencepiece model.
    """
    return cls(epath.Path(path).read_bytes(), where=str(path))

  def __reduce__(self):
    """Pickles the model's bytes."""
    return (type(self), (self.model_bytes,))

  def encode(self, text: str) -> list[int]:
    """Encodes one text.

    Args:
      text: Any text; `<s>`, `</s>` and `<unk>` in it are special tokens.

    Returns:
      Its ids. Nothing is added: BOS stands where the text says `<s>`.
    """
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
    """Encodes many texts in parallel.

    Args:
      texts: The texts.
      num_threads: Threads to use; -1 for one a core.

    Returns:
      For each text what `encode` gives.
    """
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
    """Decodes ids into text.

    Args:
      ids: Token ids, each in [0, V).

    Returns:
      The text. `<s>` and `</s>` give nothing, and a blank at the very start,
      which the dummy prefix looks like, is dropped.
    """
    return self._processor.decode([int(i) for i in ids])


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
  """Trains a byte-pair encoding with Mistral's settings on the texts.

  The texts are read once. About `MAX_TRAINING_CHARACTERS` of them are used,
  chosen by their content: the same texts give the same model.

  Args:
    texts: Texts of the data the tokenizer is for.
    vocab_size: Number of pieces V, of which 259 are special and byte pieces.

  Returns:
    A serialized sentencepiece model for `Tokenizer`.

  Raises:
    ValueError: The texts cannot give that many pieces.
  """
  # A newline must not get into a piece: see Tokenizer.
  lines = (
    line for text in _sample_texts(texts) for line in text.split('\n') if line
  )
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines,
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      byte_fallback=True,
      normalization_rule_name='identity',
      add_dummy_prefix=True,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      unk_id=0,
      bos_id=1,
      eos_id=2,
      pad_id=-1,
      unk_piece='<unk>',
      bos_piece=BOS,
      eos_piece=EOS,
      max_sentence_length=4 * MAX_CHARACTERS_A_TEXT,  # in bytes; else skipped
      minloglevel=3,
    )
  except RuntimeError as error:
    # sentencepiece's message begins with its own file, line and condition.
    reason = str(error).rpartition('] ')[2] or 'there is no text'
    raise TokenizerError(
      f'no tokenizer of {vocab_size} pieces can be trained on these texts: '
      f'{reason}'
    ) from error
  return model.getvalue()


def _sample_texts(texts: Iterable[str]) -> list[str]:
  """Keeps the texts whose hash is lowest, as many as the limit allows.

  A threshold on the hash that is halved whenever the sample overflows makes
  this one pass in bounded memory, independent of the texts' order.
  """
  threshold = 1 << 32
  sample: list[tuple[int, str]] = []
  characters = 0
  for text in texts:
    text = text[:MAX_CHARACTERS_A_TEXT]
    value = zlib.crc32(text.encode())
    if value < threshold:
      sample.append((value, text))
      characters += len(text)
    while characters > MAX_TRAINING_CHARACTERS:
      threshold //= 2
      sample = [item for item in sample if item[0] < threshold]
      characters = sum(len(text) for _, text in sample)
  return [text for _, text in sample]
