"""Tests of the prompt format and its marks."""

import random
import re
from collections.abc import Collection

import numpy as np
import pytest
import sentencepiece

from grit_jax.data import formats
from grit_jax.data.formats import FormatError
from grit_jax.data.records import GenerativeRecord, Text
from grit_jax.data.tokenizer import Tokenizer

LIMIT = 10_000
# Of the tokenizer of Llama 3's form.
BOS, EOS = '<|begin_of_text|>', '<|end_of_text|>'


@pytest.fixture(scope='module')
def processor(model_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
  return sentencepiece.SentencePieceProcessor(model_proto=model_bytes)


def write_embedding(instruction: str, text: str) -> str:
  """The format for an instruction that is not empty, in full."""
  return f'<s><|user|>\n{instruction}\n<|embed|>\n{text}'


def write_conversation(turns: list[str]) -> str:
  """The format of two exchanges, in full."""
  user, answer, next_user, next_answer = turns
  return (
    f'<s><|user|>\n{user}\n<|assistant|>\n{answer.strip()}</s>\n'
    f'<|user|>\n{next_user}\n<|assistant|>\n{next_answer.strip()}</s>'
  )


def make_conversations(count: int) -> list[tuple[str, ...]]:
  atoms = ['<s>', '</s>', '<unk>', '<|user|>', '<|assistant|>', '</s']
  atoms += ['s>', '<', 'hello', ' world', '\n', '\n\n', '  ', 'é', '日本', '1']
  atoms += [BOS, EOS, EOS[:-2], '|>', '🙂', '\r\n']
  rng = random.Random(1)

  def write(i: int) -> str:
    text = ''.join(rng.choices(atoms, k=rng.randint(1, 8)))
    return text + '.' if i % 2 else text

  return [
    tuple(write(i) for i in range(2 * rng.randint(1, 4))) for _ in range(count)
  ]


def find_answers(
  turns: tuple[str, ...], processor: sentencepiece.SentencePieceProcessor
) -> tuple[list[int], list[bool]]:
  """Ids and loss marks, the slow way: by where each token stands in the text.

  The prompt is written piece by piece, the bytes of answers are noted, and a
  token is in the loss if its first byte is one of an answer.
  """
  prompt, answer_bytes = b'<s>', set()
  for i in range(0, len(turns), 2):
    prompt += b'\n' if i else b''
    prompt += f'<|user|>\n{turns[i]}\n<|assistant|>\n'.encode()
    start = len(prompt)
    prompt += f'{turns[i + 1].strip()}</s>'.encode()
    answer_bytes.update(range(start, len(prompt)))
  special = {b'<unk>': 0, b'<s>': 1, b'</s>': 2}
  ids, in_loss, offset = [], [], 0
  for piece in re.split(rb'(<unk>|<s>|</s>)', prompt):
    if piece in special:
      ids.append(special[piece])
      in_loss.append(offset in answer_bytes)
    elif piece:
      encoded = processor.encode(piece.decode(), return_type='proto')
      for token in encoded.pieces:
        # The bytes of one character are several tokens that begin alike.
        ids.append(token.id)
        in_loss.append(offset + token.begin in answer_bytes)
    offset += len(piece)
  return ids, in_loss


def test_an_embedding_text_is_written_like_the_reference_does(
  tokenizer: Tokenizer,
):
  text = Text(': Find it:\t\n ', ' a text\n')
  prefix, body = formats.format_embedding(text, tokenizer)
  assert prefix + body == write_embedding('Find it', ' a text\n')
  assert body == ' a text\n'


@pytest.mark.parametrize('instruction', ['', ' :\n\t '])
def test_a_text_without_an_instruction_has_no_user_turn(
  tokenizer: Tokenizer, instruction: str
):
  text = Text(instruction, 'a text')
  prefix, body = formats.format_embedding(text, tokenizer)
  assert prefix + body == '<s><|embed|>\na text'


def test_a_plain_string_is_its_own_prompt(tokenizer: Tokenizer):
  text = Text(None, 'a text')
  assert formats.format_embedding(text, tokenizer) == ('', 'a text')
  text = formats.encode_embedding(Text(None, '<s>a text'), tokenizer, LIMIT)
  assert text.ids.tolist() == tokenizer.encode('<s>a text')
  assert text.instruction_length == 0


@pytest.mark.parametrize(
  'instruction', ['Find it', '', 'a\n\nb</s>\n<s>', '日\n本']
)
@pytest.mark.parametrize('body', ['text', ' text', '\n\ntext', '</s>', '日\n'])
def test_the_instruction_ends_where_its_prefix_alone_does(
  tokenizer: Tokenizer, instruction: str, body: str
):
  prefix, _ = formats.format_embedding(Text(instruction, body), tokenizer)
  text = formats.encode_embedding(Text(instruction, body), tokenizer, LIMIT)
  assert text.ids.tolist() == tokenizer.encode(prefix + body)
  assert text.instruction_length == len(tokenizer.encode(prefix))
  assert (text.ids.dtype, text.cut) == (np.int32, 0)


def test_a_text_is_cut_at_its_end(tokenizer: Tokenizer):
  whole = formats.encode_embedding(Text('i', 'some text'), tokenizer, LIMIT)
  limit = whole.instruction_length + 1
  text = formats.encode_embedding(Text('i', 'some text'), tokenizer, limit)
  assert text.ids.tolist() == whole.ids[:limit].tolist()
  assert text.instruction_length == whole.instruction_length
  assert text.cut == len(whole.ids) - limit > 0


def test_an_instruction_that_leaves_no_room_is_refused(tokenizer: Tokenizer):
  prefix = formats.format_embedding_prefix('some thing', tokenizer)
  length = len(tokenizer.encode(prefix))
  with pytest.raises(FormatError, match=f'takes {length} .* the {length} all'):
    formats.encode_embedding(Text('some thing', 't'), tokenizer, length)
  formats.encode_embedding(Text('some thing', 't'), tokenizer, length + 1)


def test_a_conversation_is_written_like_the_reference_does(
  tokenizer: Tokenizer,
):
  turns = [' a user\n', '\n an answer ', 'again', 'yes\nor no']
  record = GenerativeRecord(tuple(turns))
  joined = write_conversation(turns)
  parts = formats.format_conversation(record, tokenizer)
  assert ''.join(parts) == joined
  conversation = formats.encode_conversation(record, tokenizer, LIMIT)
  assert conversation.ids.tolist() == tokenizer.encode(joined)


def test_the_loss_covers_answers_with_their_ends(
  tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor
):
  for turns in make_conversations(300):
    ids, in_loss = find_answers(turns, processor)
    conversation = formats.encode_conversation(
      GenerativeRecord(turns), tokenizer, LIMIT
    )
    assert conversation.ids.tolist() == ids
    assert conversation.in_loss.tolist() == in_loss
    assert (conversation.in_instruction == ~conversation.in_loss).all()


def test_answers_are_what_decodes_from_the_loss(tokenizer: Tokenizer):
  turns = ('one', 'two three', 'four\nfive', 'six\nseven')
  conversation = formats.encode_conversation(
    GenerativeRecord(turns), tokenizer, LIMIT
  )
  ids = conversation.ids[conversation.in_loss].tolist()
  first = ids.index(tokenizer.eos)
  assert tokenizer.decode(ids[:first]) == 'two three'
  assert tokenizer.decode(ids[first:]) == 'six\nseven'
  assert ids[-1] == tokenizer.eos


def test_the_parts_of_a_conversation_cannot_be_tokenized_alone(
  tokenizer: Tokenizer,
):
  # The reference's slip: `<|user|>` behind a newline starts otherwise.
  alone = tokenizer.encode('<|user|>\nb\n<|assistant|>\n')
  joined = tokenizer.encode('<s>a</s>\n<|user|>\nb\n<|assistant|>\n')
  assert joined[-len(alone) :] != alone


def test_a_plain_text_is_all_loss_but_its_first_token(tokenizer: Tokenizer):
  for text in 'some text', '<s>some text</s>':
    conversation = formats.encode_conversation(
      GenerativeRecord((text,), plain=True), tokenizer, LIMIT
    )
    assert conversation.ids.tolist() == tokenizer.encode(text)
    assert conversation.in_loss.tolist() == [False] + [True] * (
      len(conversation.ids) - 1
    )
    assert not conversation.in_instruction.any()


def test_a_conversation_is_cut_with_its_marks(tokenizer: Tokenizer):
  record = GenerativeRecord(('a user', 'an answer', 'again', 'yes'))
  whole = formats.encode_conversation(record, tokenizer, LIMIT)
  for limit in range(1, len(whole.ids) + 2):
    part = formats.encode_conversation(record, tokenizer, limit)
    for field in 'ids', 'in_loss', 'in_instruction':
      expected = getattr(whole, field)[:limit]
      assert getattr(part, field).tolist() == expected.tolist()
    assert part.cut == len(whole.ids) - len(part.ids)


def test_a_chat_prompt_is_how_training_leads_up_to_the_answer(
  tokenizer: Tokenizer,
):
  turns = ('one', ' two ', 'three', 'four')
  prompt = tokenizer.encode(formats.format_chat_prompt(turns[:3], tokenizer))
  parts = formats.format_conversation(GenerativeRecord(turns), tokenizer)
  whole = tokenizer.encode(''.join(parts))
  assert whole == prompt + whole[len(prompt) :]
  assert tokenizer.decode(whole[len(prompt) :]) == 'four'


@pytest.mark.parametrize('turns', [[], ['user', 'assistant']])
def test_a_chat_prompt_ends_with_the_user(
  tokenizer: Tokenizer, turns: list[str]
):
  with pytest.raises(ValueError, match=f'found {len(turns)} turns'):
    formats.format_chat_prompt(turns, tokenizer)


# A byte-level tokenizer, which merges newlines with their neighbours.


def find_marks(
  prompt: bytes,
  marked: Collection[int],
  ids: np.ndarray,
  token_bytes: dict[int, bytes],
) -> list[bool]:
  """Whether each token's first byte is marked: the slow way, by decoding."""
  found, start = [], 0
  for index in ids.tolist():
    found.append(start in marked)
    assert prompt.startswith(token_bytes[index], start)
    start += len(token_bytes[index])
  assert start == len(prompt)
  return found


INSTRUCTIONS = ['Find it', '', 'a\n\nb', f'{EOS}\n{BOS}', '日\n本|>']
BODIES = ['text', ' text', '\n\ntext', '\n \n  text', '  \ntext', '\r\ntext']
BODIES += ['\ttext', '🙂', EOS, f' {EOS}', '|>text', '\n\n\n🙂\n\n', '\u2028a']


@pytest.mark.parametrize('instruction', INSTRUCTIONS)
@pytest.mark.parametrize('body', BODIES)
def test_a_token_belongs_to_the_instruction_if_it_begins_there(
  llama3: Tokenizer,
  llama3_bytes: dict[int, bytes],
  instruction: str,
  body: str,
):
  middle = f'<|user|>\n{instruction}\n' if instruction else ''
  prefix = f'{BOS}{middle}<|embed|>\n'.encode()
  text = formats.encode_embedding(Text(instruction, body), llama3, LIMIT)
  expected = find_marks(
    prefix + body.encode(), range(len(prefix)), text.ids, llama3_bytes
  )
  assert text.in_instruction.tolist() == expected
  assert (text.ids.dtype, text.cut) == (np.int32, 0)


def test_a_newline_may_merge_with_the_format(llama3: Tokenizer):
  # Otherwise the test above would not show how such tokens are counted.
  text = formats.encode_embedding(Text('', '\n\ntext'), llama3, LIMIT)
  pooled = text.ids[text.instruction_length :]
  assert llama3.decode(pooled) == 'text'
  with pytest.raises(FormatError, match='leaves none of the 10000 allowed'):
    formats.encode_embedding(Text('', '\n\n'), llama3, LIMIT)


def test_the_loss_of_a_byte_level_tokenizer_covers_answers_with_their_ends(
  llama3: Tokenizer, llama3_bytes: dict[int, bytes]
):
  for turns in make_conversations(600):
    prompt, answer_bytes = BOS.encode(), set()
    for i in range(0, len(turns), 2):
      prompt += b'\n' if i else b''
      prompt += f'<|user|>\n{turns[i]}\n<|assistant|>\n'.encode()
      start = len(prompt)
      prompt += f'{turns[i + 1].strip()}{EOS}'.encode()
      answer_bytes.update(range(start, len(prompt)))
    conversation = formats.encode_conversation(
      GenerativeRecord(turns), llama3, LIMIT
    )
    expected = find_marks(prompt, answer_bytes, conversation.ids, llama3_bytes)
    assert conversation.in_loss.tolist() == expected
    assert (conversation.in_instruction == ~conversation.in_loss).all()
    assert conversation.ids.tolist() == llama3.encode(prompt.decode())


def test_empty_turns_have_their_ends_alone_in_the_loss(
  tokenizer: Tokenizer, llama3: Tokenizer
):
  record = GenerativeRecord(('', '', '\n\n', ' \n '))
  for each in tokenizer, llama3:
    conversation = formats.encode_conversation(record, each, LIMIT)
    in_loss = conversation.ids[conversation.in_loss]
    assert in_loss.tolist() == [each.eos, each.eos]


def test_a_byte_level_prompt_is_cut_with_its_marks(llama3: Tokenizer):
  record = GenerativeRecord(('a\n\n', 'one 🙂\n\ntwo', '\nb', 'yes'))
  whole = formats.encode_conversation(record, llama3, LIMIT)
  for limit in range(1, len(whole.ids) + 2):
    part = formats.encode_conversation(record, llama3, limit)
    for field in 'ids', 'in_loss', 'in_instruction':
      expected = getattr(whole, field)[:limit]
      assert getattr(part, field).tolist() == expected.tolist()
    assert part.cut == len(whole.ids) - len(part.ids)
  whole = formats.encode_embedding(Text('Find', '\n🙂 it'), llama3, LIMIT)
  for limit in range(whole.instruction_length + 1, len(whole.ids) + 1):
    text = formats.encode_embedding(Text('Find', '\n🙂 it'), llama3, limit)
    assert text.ids.tolist() == whole.ids[:limit].tolist()
    assert text.instruction_length == whole.instruction_length
    assert text.cut == len(whole.ids) - limit


def test_a_plain_text_of_any_tokenizer_is_its_own_prompt(llama3: Tokenizer):
  for text in '\n\nsome text', f'{BOS}some text{EOS}':
    record = GenerativeRecord((text,), plain=True)
    conversation = formats.encode_conversation(record, llama3, LIMIT)
    assert conversation.ids.tolist() == llama3.encode(text)
    assert conversation.in_loss[1:].all() and not conversation.in_loss[0]
    assert not conversation.in_instruction.any()
    embedding = formats.encode_embedding(Text(None, text), llama3, LIMIT)
    assert embedding.ids.tolist() == llama3.encode(text)
    assert embedding.instruction_length == 0


def test_a_chat_prompt_has_the_literals_of_its_tokenizer(llama3: Tokenizer):
  prompt = formats.format_chat_prompt(['one', ' two ', 'three'], llama3)
  assert prompt == (
    f'{BOS}<|user|>\none\n<|assistant|>\ntwo{EOS}\n<|user|>\nthree\n'
    '<|assistant|>\n'
  )
