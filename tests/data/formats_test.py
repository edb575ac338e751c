"""Tests of the prompt format and its marks."""

import random
import re

import numpy as np
import pytest
import sentencepiece

from grit_jax.data import formats
from grit_jax.data.formats import FormatError
from grit_jax.data.records import GenerativeRecord, Text
from grit_jax.data.tokenizer import Tokenizer

LIMIT = 10_000


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


def test_an_embedding_text_is_written_like_the_reference_does():
  prefix, body = formats.format_embedding(Text(': Find it:\t\n ', ' a text\n'))
  assert prefix + body == write_embedding('Find it', ' a text\n')
  assert body == ' a text\n'


@pytest.mark.parametrize('instruction', ['', ' :\n\t '])
def test_a_text_without_an_instruction_has_no_user_turn(instruction: str):
  prefix, body = formats.format_embedding(Text(instruction, 'a text'))
  assert prefix + body == '<s><|embed|>\na text'


def test_a_plain_string_is_its_own_prompt(tokenizer: Tokenizer):
  assert formats.format_embedding(Text(None, 'a text')) == ('', 'a text')
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
  prefix, _ = formats.format_embedding(Text(instruction, body))
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
  length = len(tokenizer.encode(formats.format_embedding_prefix('some thing')))
  with pytest.raises(FormatError, match=f'takes {length} .* the {length} all'):
    formats.encode_embedding(Text('some thing', 't'), tokenizer, length)
  formats.encode_embedding(Text('some thing', 't'), tokenizer, length + 1)


def test_a_conversation_is_written_like_the_reference_does(
  tokenizer: Tokenizer,
):
  turns = [' a user\n', '\n an answer ', 'again', 'yes\nor no']
  record = GenerativeRecord(tuple(turns))
  joined = write_conversation(turns)
  assert formats.join_conversation(record) == joined
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
  prompt = tokenizer.encode(formats.format_chat_prompt(turns[:3]))
  whole = tokenizer.encode(formats.join_conversation(GenerativeRecord(turns)))
  assert whole == prompt + whole[len(prompt) :]
  assert tokenizer.decode(whole[len(prompt) :]) == 'four'


@pytest.mark.parametrize('turns', [[], ['user', 'assistant']])
def test_a_chat_prompt_ends_with_the_user(turns: list[str]):
  with pytest.raises(ValueError, match=f'found {len(turns)} turns'):
    formats.format_chat_prompt(turns)
