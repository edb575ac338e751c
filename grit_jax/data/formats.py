r"""The prompt format: what tells embedding from generation.

An embedding text, with an instruction and without:

    <s><|user|>\n{instruction}\n<|embed|>\n{text}
    <s><|embed|>\n{text}

A conversation, whose further turns are joined by a newline:

    <s><|user|>\n{user}\n<|assistant|>\n{assistant}</s>\n<|user|>\n...

`<s>` and `</s>` stand for the literals of the tokenizer's BOS and EOS, which
are special tokens, also where they stand in the data; `<|user|>` and the like
are plain text. Instructions lose blanks, newlines, tabs and colons at their
ends, answers lose white space, and the rest stays as it is.

A plain string in the data is its own prompt: nothing is added to it, not even
BOS, and all of it counts. That is what the reference trains with, and it lets
a data set bring another format, `<s>` and `</s>` included.

A prompt is a list of parts, in turn one that the model is told and one that
counts: pooled, or in the loss. The tokens of the whole string are computed
once, and the tokenizer says which part each belongs to. Tokenizing the parts
each by itself would be wrong: a word gets a dummy prefix at the start of a
string alone, and characters merge over the boundary of two parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.data.records import GenerativeRecord, Text
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.errors import UserError

USER = '<|user|>\n'
EMBED = '<|embed|>\n'
ASSISTANT = '<|assistant|>\n'


class FormatError(UserError):
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


def format_embedding(text: Text, tokenizer: Tokenizer) -> tuple[str, str]:
  """Formats a text to embed.

  Args:
    text: The text with its instruction.
    tokenizer: The tokenizer whose BOS it begins with.

  Returns:
    The prefix, which is not pooled, and the body, which is. The prompt is the
    one followed by the other.
  """
  if text.instruction is None:
    return '', text.text
  return format_embedding_prefix(text.instruction, tokenizer), text.text


def format_embedding_prefix(instruction: str, tokenizer: Tokenizer) -> str:
  """Formats what stands before a text to embed.

  Args:
    instruction: The instruction; "" for none.
    tokenizer: The tokenizer whose BOS it begins with.

  Returns:
    The prefix, from `<s>` through the newline after `<|embed|>`.
  """
  instruction = instruction.strip('\t\n :')
  user = f'{USER}{instruction}\n' if instruction else ''
  return f'{tokenizer.bos_piece}{user}{EMBED}'


def format_conversation(
  record: GenerativeRecord, tokenizer: Tokenizer
) -> list[str]:
  """Formats a conversation or a plain text.

  Args:
    record: The record.
    tokenizer: The tokenizer whose BOS and EOS are written.

  Returns:
    In turn what is not in the loss and what is, of a plain text "" and the
    text. The prompt is all of them joined.
  """
  if record.plain:
    return ['', record.turns[0]]
  exchanges = format_turns(record.turns, tokenizer)
  return [part for exchange in exchanges for part in exchange]


def format_turns(
  turns: Sequence[str], tokenizer: Tokenizer
) -> list[tuple[str, str]]:
  """Formats the turns of a conversation.

  Args:
    turns: User and assistant turns alternating, an even number.
    tokenizer: The tokenizer whose BOS and EOS are written.

  Returns:
    For each exchange the prefix, through the newline after `<|assistant|>`,
    and the answer with its `</s>`. The prompt is all of them joined.
  """
  exchanges = []
  for i in range(0, len(turns), 2):
    start = '\n' if i else tokenizer.bos_piece
    prefix = f'{start}{USER}{turns[i]}\n{ASSISTANT}'
    exchanges.append((prefix, turns[i + 1].strip() + tokenizer.eos_piece))
  return exchanges


def format_chat_prompt(turns: Sequence[str], tokenizer: Tokenizer) -> str:
  """Formats a conversation that the model has to continue.

  Args:
    turns: User and assistant turns alternating, the last one the user's.
    tokenizer: The tokenizer whose BOS and EOS are written.

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
  exchanges = format_turns([*turns, ''], tokenizer)
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
  ids, part = tokenizer.encode_parts(format_embedding(text, tokenizer))
  return mark_embedding(ids, part, max_tokens)


def mark_embedding(
  ids: np.ndarray, part: np.ndarray, max_tokens: int
) -> EmbeddingText:
  """Finds where the prefix of a tokenized prompt ends, and cuts the prompt.

  Args:
    ids: int32 [T], the ids of what `format_embedding` gave.
    part: int32 [T], the part of each token: 0 the prefix, 1 the body.
    max_tokens: Number of tokens to keep.

  Returns:
    The tokens.

  Raises:
    FormatError: The prefix leaves no room for the text.
  """
  length = int(np.count_nonzero(part == 0))
  if length >= min(len(ids), max_tokens):
    raise FormatError(
      f'the instruction takes {length} tokens with its format, which leaves '
      f'none of the {max_tokens} allowed for the text'
    )
  kept = ids[:max_tokens]
  return EmbeddingText(kept, length, len(ids) - len(kept))


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
  ids, part = tokenizer.encode_parts(format_conversation(record, tokenizer))
  return mark_conversation(ids, part, max_tokens)


def mark_conversation(
  ids: np.ndarray, part: np.ndarray, max_tokens: int
) -> Conversation:
  """Marks the answers in a tokenized conversation, and cuts it.

  Args:
    ids: int32 [T], the ids of what `format_conversation` gave.
    part: int32 [T], the part of each token: odd for answers and plain text.
    max_tokens: Number of tokens to keep.

  Returns:
    The tokens.
  """
  kept = ids[:max_tokens]
  in_instruction = part[:max_tokens] % 2 == 0
  return mark_tokens(kept, in_instruction, len(ids) - len(kept))


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
