"""A sentencepiece model trained on the data, where no base model brings one.

Its settings are those of Mistral's, so that everything downstream is the same
for it.
"""

import io
import zlib
from collections.abc import Iterable

import sentencepiece

from grit_jax.data.tokenizer import BOS, EOS, TokenizerError

# Enough for 8192 pieces of source text or prose; a tokenizer for a larger
# vocabulary comes with its base model and is not trained here.
MAX_TRAINING_CHARACTERS = 6_000_000
# So that one long document cannot be the whole sample.
MAX_CHARACTERS_A_TEXT = 20_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
  """Trains a byte-pair encoding with Mistral's settings on the texts.

  The texts are read once. About `MAX_TRAINING_CHARACTERS` of them are used,
  chosen by their content: the same texts give the same model.

  Args:
    texts: Texts of the data the tokenizer is for.
    vocab_size: Number of pieces V, of which 259 are special and byte pieces.

  Returns:
    A serialized sentencepiece model for `SentencePieceTokenizer`.

  Raises:
    ValueError: The texts cannot give that many pieces.
  """
  # A newline must not get into a piece: see SentencePieceTokenizer.
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
