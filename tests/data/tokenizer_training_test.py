"""Tests of training a tokenizer on the data."""

import pytest
import sentencepiece

from grit_jax.data import tokenizer_training
from grit_jax.data.tokenizer import SentencePieceTokenizer
from grit_jax.data.tokenizer_training import train_tokenizer


def test_training_is_deterministic():
  texts = [f'text number {i}\nof several' for i in range(100)]
  assert train_tokenizer(texts, 290) == train_tokenizer(iter(texts), 290)


def test_trained_pieces_hold_blanks_but_no_newline(model_bytes):
  processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
  pieces = [processor.id_to_piece(i) for i in range(259, 500)]
  assert not any('\n' in piece for piece in pieces)
  assert any(set(piece) == {'▁'} and len(piece) > 1 for piece in pieces)


def test_training_parts_digits():
  trained = SentencePieceTokenizer(
    train_tokenizer(['in 1999 there were 1999 cars'] * 9, 285)
  )
  assert len(trained.encode('1999')) >= 4


def test_training_uses_a_sample_of_bounded_size(monkeypatch):
  monkeypatch.setattr(tokenizer_training, 'MAX_TRAINING_CHARACTERS', 10_000)
  texts = [f'text number {i}' for i in range(10_000)]
  sample = tokenizer_training._sample_texts(iter(texts))
  assert 2_500 < sum(map(len, sample)) <= 10_000
  # From all over the texts, and whatever their order.
  assert texts.index(sample[0]) < 1_000 and texts.index(sample[-1]) > 9_000
  assert sorted(tokenizer_training._sample_texts(texts[::-1])) == sorted(sample)


def test_training_takes_long_texts_into_account(model_bytes):
  line = 'unusual ' * 2_000
  pieces = SentencePieceTokenizer(train_tokenizer([line], 270)).encode(
    ' unusual'
  )
  assert len(pieces) < len(' unusual')


@pytest.mark.parametrize(
  'texts, vocab_size, message',
  [
    ([], 300, '300 pieces .* there is no text'),
    (['abc'], 8192, '8192 pieces .* Please set it to a value <= '),
    (['abc'], 100, '100 pieces .* smaller than required'),
  ],
)
def test_texts_that_cannot_give_the_vocabulary_are_refused(
  texts, vocab_size, message
):
  with pytest.raises(ValueError, match=message):
    train_tokenizer(texts, vocab_size)
