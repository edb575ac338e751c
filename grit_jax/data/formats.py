r"""The prompt format: what tells embedding from generation.

An embedding text, with an instruction and without:

    <s><|user|>\n{instruction}\n<|embed|>\n{text}
    <s><|embed|>\n{text}

A conversation, whose further turns are joined by a newline:

    <s><|user|>\n{user}\n<|assistant|>\n{assistant}</s>\n<|user|>\n...

`<|user|>` and the like are plain text; `<s>` and `</s>` are special tokens,
also where they stand in the data. Instructions lose blanks, newlines, tabs and
colons at their ends, answers lose white space, and the rest stays as it is.

A plain string in the data is its own prompt: nothing is added to it, not even
BOS, and all of it counts. That is what the reference trains with, and it lets
a data set bring another format, `<s>` and `</s>` included.

Every prefix ends in a newline, and every newline is one token (see
`grit_jax.data.tokenizer`). So the tokens of the whole string are computed
once, and a prefix ends behind as many newline tokens as it has newlines.
Tokenizing the parts of a conversation each by itself would be wrong: a word
gets a dummy prefix at the start of a string alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.data.records import GenerativeRecord, Text
from grit_jax.data.tokenizer import BOS, EOS, Tokenizer

USER = '<|user|>\n'
EMBED = '<|embed|>\n'
ASSISTANT = '<|assistant|>\n'


class FormatError(ValueError):
  """A text that the prompt format leaves no room for."""


class EmbeddingText(NamedTuple):
  """A text to embed, as tokens.

  Attributes:
    ids: int32 [T], the token ids.
    instruction_length: Number of leading tokens that are not pooled: BOS and
      the prefix. At least one token follows them.
    cut: Number of tokens that were dropped at the end. Not stored in data
      sets: 0 in what is read from one.
  """

  ids: np.ndarray
  instruction_length: int
  cut: int = 0

  @property
  def in_instruction(self) -> np.ndarray:
    """Bool [tokens]: those before the text, which are not pooled."""
    return np.arange(len(self.ids)) < self.instruction_length


class Conversation(NamedTuple):
  """A conversation or plain text, as tokens.

  Attributes:
    ids: int32 [T], the token ids.
    in_loss: bool [T], the tokens the model has to predict: the answers, each
      with its `</s>`; of a plain text all but the first, which nothing
      precedes.
    in_instruction: bool [T], the tokens of BOS, the user turns and the format;
      none of a plain text.
    cut: Number of tokens that were dropped at the end. Not stored in data
      sets: 0 in what is read from one.
  """

  ids: np.ndarray
  in_loss: np.ndarray
  in_instruction: np.ndarray
  cut: int = 0


def format_embedding(text: Text) -> tuple[str, str]:
  """Formats a text to embed.

  Args:
    text: The text with its instruction.

  Returns:
    The prefix, which is not pooled, and the body, which is. The prompt is the
    one followed by the other.
  """
  if text.instruction is None:
    return '', text.text
  return format_embedding_prefix(text.instruction), text.text


def format_embedding_prefix(instruction: str) -> str:
  """Formats what stands before a text to embed.

  Args:
    instruction: The instruction; "" for none.

  Returns:
    The prefix, from `<s>` through the newline after `<|embed|>`.
  """
  instruction = instruction.strip('\t\n :')
  return f'{BOS}{USER}{instruction}\n{EMBED}' if instruction else BOS + EMBED


def format_turns(turns: Sequence[str]) -> list[tuple[str, str]]:
  """Formats a conversation.

  Args:
    turns: User and assistant turns alternating, an even number.

  Returns:
    For each exchange the prefix, through the newline after `<|assistant|>`,
    and the answer with its `</s>`. The prompt is all of them joined.
  """
  exchanges = []
  for i in range(0, len(turns), 2):
    start = '\n' if i else BOS
    prefix = f'{start}{USER}{turns[i]}\n{ASSISTANT}'
    exchanges.append((prefix, turns[i + 1].strip() + EOS))
  return exchanges


def format_chat_prompt(turns: Sequence[str]) -> str:
  """Formats a conversation that the model has to continue.

  Args:
    turns: User and assistant turns alternating, the last one the user's.

  Returns:
    The prompt, from `<s>` through the newline after the last `<|assistant|>`.

  Raises:
    ValueError: The last turn is not the user's.
  """
  if len(turns) % 2 == 0:
    raise ValueError(
      f'found {len(turns)} turns, expected an odd number: the last one is the '
      "user's"
    )
  exchanges = format_turns([*turns, ''])
  complete = ''.join(prefix + answer for prefix, answer in exchanges[:-1])
  return complete + exchanges[-1][0]


def encode_embedding(
  text: Text, tokenizer: Tokenizer, max_tokens: int
) -> EmbeddingText:
  """Formats and tokenizes a text to embed.

  Args:
    text: The text with its instruction.
    tokenizer: The tokenizer.
    max_tokens: Number of tokens to keep, counted from the start.

  Returns:
    The tokens.

  Raises:
    FormatError: The instruction leaves no room for the text.
  """
  prefix, body = format_embedding(text)
  ids = tokenizer.encode(prefix + body)
  return mark_embedding(prefix, ids, tokenizer, max_tokens)


def mark_embedding(
  prefix: str, ids: Sequence[int], tokenizer: Tokenizer, max_tokens: int
) -> EmbeddingText:
  """Finds where the prefix of a tokenized prompt ends, and cuts the prompt.

  Args:
    prefix: The prefix that `format_embedding` gave.
    ids: The ids of the prefix followed by the body.
    tokenizer: The tokenizer that gave the ids.
    max_tokens: Number of tokens to keep.

  Returns:
    The tokens.

  Raises:
    FormatError: The prefix leaves no room for the text.
  """
  whole = np.array(ids, np.int32)
  length = 0
  newlines = prefix.count('\n')
  if newlines:
    length = int(np.flatnonzero(whole == tokenizer.newline)[newlines - 1]) + 1
  if length >= min(len(whole), max_tokens):
    raise FormatError(
      f'the instruction takes {length} tokens with its format, which leaves '
      f'none of the {max_tokens} allowed for the text'
    )
  kept = whole[:max_tokens]
  return EmbeddingText(kept, length, len(whole) - len(kept))


def encode_conversation(
  record: GenerativeRecord, tokenizer: Tokenizer, max_tokens: int
) -> Conversation:
  """Formats and tokenizes a conversation or a plain text.

  Args:
    record: The record.
    tokenizer: The tokenizer.
    max_tokens: Number of tokens to keep, counted from the start. None of them
      may be in the loss: such a record is of no use.

  Returns:
    The tokens.
  """
  ids = tokenizer.encode(join_conversation(record))
  return mark_conversation(record, ids, tokenizer, max_tokens)


def join_conversation(record: GenerativeRecord) -> str:
  """Formats a conversation or a plain text into one string."""
  if record.plain:
    return record.turns[0]
  return ''.join(prefix + text for prefix, text in format_turns(record.turns))


def mark_conversation(
  record: GenerativeRecord,
  ids: Sequence[int],
  tokenizer: Tokenizer,
  max_tokens: int,
) -> Conversation:
  """Marks the answers in a tokenized conversation, and cuts it.

  Args:
    record: The record.
    ids: The ids of `join_conversation(record)`.
    tokenizer: The tokenizer that gave the ids.
    max_tokens: Number of tokens to keep.

  Returns:
    The tokens.
  """
  whole = np.array(ids, np.int32)
  in_instruction = np.zeros(len(whole), bool)
  if not record.plain:
    in_instruction[:] = True
    newline_ends = np.flatnonzero(whole == tokenizer.newline) + 1
    eos_ends = np.flatnonzero(whole == tokenizer.eos) + 1
    newlines = eos = 0
    for prefix, answer in format_turns(record.turns):
      newlines += prefix.count('\n')
      start = newline_ends[newlines - 1]
      newlines += answer.count('\n')
      # A turn may itself contain the literal, which is then the token.
      eos += prefix.count(EOS) + answer.count(EOS)
      in_instruction[start : eos_ends[eos - 1]] = False
  kept = whole[:max_tokens]
  return mark_tokens(kept, in_instruction[:max_tokens], len(whole) - len(kept))


def mark_tokens(
  ids: np.ndarray, in_instruction: np.ndarray, cut: int = 0
) -> Conversation:
  """Completes the marks of a conversation.

  Args:
    ids: int32 [T], the token ids.
    in_instruction: bool [T], the tokens outside answers and plain text.
    cut: Number of tokens that were dropped at the end.

  Returns:
    The conversation: what is not instruction is in the loss, except for a
    first token, which nothing precedes.
  """
  in_loss = ~in_instruction
  in_loss[:1] = False
  return Conversation(ids, in_loss, in_instruction, cut)
