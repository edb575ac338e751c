"""Records as examples of a TFDS data set, there and back.

An example holds a record's tokens in one flat list, and what it takes to part
them again. Lists of integers are TFDS's plainest feature; they take 1.4 bytes
a token and read millions of tokens a second, and packing them into bytes by
hand was no better.
"""

import array
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from grit_jax.data import formats
from grit_jax.data.formats import Conversation, EmbeddingText, FormatError
from grit_jax.data.records import (
  NO_ROOM,
  EmbeddingRecord,
  GenerativeRecord,
  RecordError,
)
from grit_jax.data.reports import Report, check_negatives
from grit_jax.data.tokenizer import Tokenizer

Example = Mapping[str, np.ndarray]

# To be raised whenever the files of data sets change their meaning, or texts
# their tokens.
FORMAT_VERSION = 3

NO_ANSWER = 'no answer within the limit of tokens'

_INTEGERS = tfds.features.Tensor(shape=(None,), dtype=np.int32)


class EmbeddingEncoder:
  """Turns embedding records into examples, and collects their index.

  Attributes:
    features: The TFDS features of an example: the tokens of all texts, and the
      number of tokens of each text and of its instruction, texts in the order
      query, positives, negatives.
    report: What has been encoded so far.
    index: The arrays of `grit_jax.data.dataset.EmbeddingDataset`.
  """

  features = {
    'tokens': _INTEGERS,
    'lengths': _INTEGERS,
    'instruction_lengths': _INTEGERS,
  }

  def __init__(
    self,
    tokenizer: Tokenizer,
    max_query_tokens: int,
    max_passage_tokens: int,
    min_negatives: int,
    num_threads: int,
  ):
    """Sets what to encode with; see `grit_jax.data.dataset.prepare`."""
    self.report = Report()
    self.index = {
      'offsets': array.array('q', [0]),
      'lengths': array.array('i'),
      'num_positives': array.array('i'),
      'text_hashes': array.array('Q'),
    }
    self._tokenizer = tokenizer
    self._limits = (max_query_tokens, max_passage_tokens)
    self._min_negatives = min_negatives
    self._num_threads = num_threads

  def encode(
    self, batch: Sequence[EmbeddingRecord], places: Sequence[str]
  ) -> list[Example | RecordError]:
    """Encodes some records.

    Args:
      batch: The records.
      places: Where each comes from.

    Returns:
      The example of each; or what is wrong with it: too few negatives, or an
      instruction that leaves no room for the text.
    """
    prompts = [
      formats.format_embedding(text, self._tokenizer)
      for record in batch
      for text in record.texts
    ]
    encoded = iter(
      self._tokenizer.encode_parts_batch(prompts, self._num_threads)
    )
    examples: list[Example | RecordError] = []
    for record, place in zip(batch, places, strict=True):
      parts = [next(encoded) for _ in record.texts]
      try:
        check_negatives(len(record.negatives), self._min_negatives, place)
        marked = self._mark(record, parts, place)
      except RecordError as error:
        examples.append(error)
        continue
      self.index['text_hashes'].extend(hash_text(t.text) for t in record.texts)
      examples.append(self._add(marked, len(record.positives)))
    return examples

  def _mark(
    self,
    record: EmbeddingRecord,
    parts: list[tuple[np.ndarray, np.ndarray]],
    place: str,
  ) -> list[EmbeddingText]:
    marked = []
    for i, (ids, part) in enumerate(parts):
      try:
        limit = self._limits[1 if i else 0]
        marked.append(formats.mark_embedding(ids, part, limit))
      except FormatError as error:
        path = _name_text(i, len(record.positives))
        raise RecordError(f'{place}: {path}: {error}', NO_ROOM) from error
    return marked

  def _add(self, texts: list[EmbeddingText], num_positives: int) -> Example:
    lengths = [len(text.ids) for text in texts]
    instruction_lengths = [text.instruction_length for text in texts]
    self.index['offsets'].append(self.index['offsets'][-1] + len(texts))
    self.index['lengths'].extend(lengths)
    self.index['num_positives'].append(num_positives)
    for text in texts:
      self.report.count_text(text)
    return {
      'tokens': np.concatenate([text.ids for text in texts]),
      'lengths': np.array(lengths, np.int32),
      'instruction_lengths': np.array(instruction_lengths, np.int32),
    }


def hash_text(text: str) -> int:
  """Identifies a text, whatever its instruction, by 64 bits."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'little')


def decode_embedding(example: Example) -> list[EmbeddingText]:
  """Parts the texts of an embedding example: query, positives, negatives."""
  ends = np.cumsum(example['lengths'])
  ids = np.split(example['tokens'], ends[:-1])
  lengths = example['instruction_lengths'].tolist()
  return [
    EmbeddingText(ids, length) for ids, length in zip(ids, lengths, strict=True)
  ]


class GenerativeEncoder:
  """Turns conversations and plain texts into examples, and collects the index.

  Attributes:
    features: The TFDS features of an example: the tokens, and the lengths of
      the runs that are, in turn, instruction and answer. The first run is one
      of instruction, of length 0 for a plain text.
    report: What has been encoded so far.
    index: The arrays of `grit_jax.data.dataset.GenerativeDataset`.
  """

  features = {'tokens': _INTEGERS, 'runs': _INTEGERS}

  def __init__(
    self, tokenizer: Tokenizer, max_generative_tokens: int, num_threads: int
  ):
    """Sets what to encode with; see `grit_jax.data.dataset.prepare`."""
    self.report = Report()
    self.index = {
      'lengths': array.array('i'),
      'loss_tokens': array.array('i'),
    }
    self._tokenizer = tokenizer
    self._limit = max_generative_tokens
    self._num_threads = num_threads

  def encode(
    self, batch: Sequence[GenerativeRecord], places: Sequence[str]
  ) -> list[Example | None]:
    """Encodes some records.

    Args:
      batch: The records.
      places: Where each comes from.

    Returns:
      The example of each; None for a record that is dropped, since no answer
      begins within the limit.
    """
    del places
    prompts = [
      formats.format_conversation(record, self._tokenizer) for record in batch
    ]
    examples: list[Example | None] = []
    for ids, part in self._tokenizer.encode_parts_batch(
      prompts, self._num_threads
    ):
      conversation = formats.mark_conversation(ids, part, self._limit)
      if conversation.in_loss.any():
        examples.append(self._add(conversation))
      else:
        self.report.count_dropped(NO_ANSWER)
        examples.append(None)
    return examples

  def _add(self, conversation: Conversation) -> Example:
    self.index['lengths'].append(len(conversation.ids))
    self.index['loss_tokens'].append(int(conversation.in_loss.sum()))
    self.report.count_text(conversation)
    marks = conversation.in_instruction
    # As if an instruction came before, so that the first run is always one.
    changes = np.flatnonzero(np.diff(marks, prepend=True))
    bounds = np.concatenate([[0], changes, [len(marks)]])
    return {
      'tokens': conversation.ids,
      'runs': np.diff(bounds).astype(np.int32),
    }


def decode_conversation(example: Example) -> Conversation:
  """Restores the marks of a generative example."""
  runs = example['runs']
  is_instruction = np.arange(len(runs)) % 2 == 0
  in_instruction = np.repeat(is_instruction, runs)
  return formats.mark_tokens(example['tokens'], in_instruction)


def _name_text(index: int, num_positives: int) -> str:
  if index == 0:
    return 'query'
  if index <= num_positives:
    return f'pos[{index - 1}]'
  return f'neg[{index - 1 - num_positives}]'
