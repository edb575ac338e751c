"""Tests of the tokenizer and its training."""

import functools
import importlib.util
import io
import pathlib
import pickle
import random
from collections.abc import Sequence

import pytest
import sentencepiece

from grit_jax.data import tokenizer as tokenizer_module
from grit_jax.data.tokenizer import Tokenizer, train_tokenizer

# What texts of the tests below are made of: everything that a tokenizer could
# treat in its own way.
ATOMS = (
  '<s> </s> <unk> <s </s s> <|user|> <|embed|> <0x0A> hello Hello World x y '
  '123 4.5 é ß 日本語 🙂 👩‍👩‍👧 ▁ _ < > | : \\ \' " def return self'
).split() + [' ', '  ', '\n', '\n\n', '\t', '\r\n', '\u00a0', '\u2028', ' a']


def make_nasty_texts(count: int) -> list[str]:
  rng = random.Random(0)
  return [
    ''.join(rng.choices(ATOMS, k=rng.randint(1, 12))) for _ in range(count)
  ]


def train(texts: Sequence[str], **options: object) -> bytes:
  """Trains a small model with settings that differ from ours."""
  model = io.BytesIO()
  settings = dict(
    model_type='bpe',
    vocab_size=300,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=3,
  )
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, **(settings | options)
  )
  return model.getvalue()


def test_special_tokens_have_the_usual_ids(tokenizer):
  assert (tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
  assert tokenizer.vocab_size == 500


def test_literals_of_special_tokens_are_special_wherever_they_stand(tokenizer):
  ids = tokenizer.encode('<s>a</s></s>b<unk>')
  assert [ids[0], *ids[2:4], ids[-1]] == [1, 2, 2, 0]


def test_each_piece_between_literals_is_encoded_by_itself(tokenizer):
  parts = [tokenizer.encode(text) for text in ('one', ' two', 'three')]
  ids = tokenizer.encode('one<s> two</s>three')
  assert ids == [*parts[0], 1, *parts[1], 2, *parts[2]]


@pytest.mark.parametrize('num_threads', [1, 2, -1])
def test_a_batch_is_encoded_like_its_texts(tokenizer, num_threads):
  texts = ['', *make_nasty_texts(500)]
  assert tokenizer.encode_batch(texts, num_threads) == [
    tokenizer.encode(text) for text in texts
  ]
  assert tokenizer.encode_batch([], num_threads) == []


def test_texts_without_literals_come_back_whole(tokenizer):
  for text in make_nasty_texts(500):
    if any(literal in text for literal in ('<s>', '</s>', '<unk>')):
      continue
    # sentencepiece writes a blank as ▁, and reads both back as a blank.
    text = text.replace('▁', ' ')
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_drops_the_ends_of_a_prompt(tokenizer):
  assert tokenizer.decode(tokenizer.encode('<s>an answer</s>')) == 'an answer'


def test_every_newline_is_one_token(tokenizer):
  for text in make_nasty_texts(500):
    assert tokenizer.encode(text).count(tokenizer.newline) == text.count('\n')


def test_what_follows_a_newline_does_not_change_what_precedes(tokenizer):
  texts = make_nasty_texts(500)
  for prefix, text in zip(texts[::2], texts[1::2], strict=True):
    start = tokenizer.encode(prefix + '\n')
    assert tokenizer.encode(prefix + '\n' + text)[: len(start)] == start


def test_a_tokenizer_survives_pickling(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.fingerprint == tokenizer.fingerprint
  assert copy.encode('<s>a b\n') == tokenizer.encode('<s>a b\n')


def test_a_tokenizer_is_loaded_from_its_file(tokenizer, tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(tokenizer.model_bytes)
  assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='no.model'):
    Tokenizer.load(tmp_path / 'no.model')


@pytest.mark.parametrize('data', [b'no model', b''])
def test_a_file_that_is_no_model_is_named(tmp_path, data):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=f'{path}: not a sentencepiece model'):
    Tokenizer.load(path)


BAD_MODELS = {
  'no bos': (dict(bos_id=-1), 'has no bos token'),
  'no eos': (dict(eos_id=-1), 'has no eos token'),
  'another bos': (dict(bos_piece='[BOS]'), r"the bos token is '\[BOS\]'"),
  'a newline in a piece': (
    dict(user_defined_symbols=['\n\n']),
    r"is '\\n\\n'; with a newline",
  ),
  'newlines turned into blanks': (
    dict(normalization_rule_name='nmt_nfkc'),
    'does not keep newlines',
  ),
  'no byte fallback': (
    dict(byte_fallback=False, vocab_size=40),
    'does not keep newlines',
  ),
  'a dummy suffix': (
    dict(treat_whitespace_as_suffix=True),
    'does not keep newlines',
  ),
}


@pytest.mark.parametrize('name', BAD_MODELS)
def test_a_model_that_the_format_cannot_use_is_refused(name):
  options, message = BAD_MODELS[name]
  model = train(['hello world, user and embed'] * 4, **options)
  with pytest.raises(ValueError, match=message):
    Tokenizer(model)


def test_training_is_deterministic():
  texts = [f'text number {i}\nof several' for i in range(100)]
  assert train_tokenizer(texts, 290) == train_tokenizer(iter(texts), 290)


def test_trained_pieces_hold_blanks_but_no_newline(model_bytes):
  processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
  pieces = [processor.id_to_piece(i) for i in range(259, 500)]
  assert not any('\n' in piece for piece in pieces)
  assert any(set(piece) == {'▁'} and len(piece) > 1 for piece in pieces)


def test_training_parts_digits():
  trained = Tokenizer(
    train_tokenizer(['in 1999 there were 1999 cars'] * 9, 285)
  )
  assert len(trained.encode('1999')) >= 4


def test_training_uses_a_sample_of_bounded_size(monkeypatch):
  monkeypatch.setattr(tokenizer_module, 'MAX_TRAINING_CHARACTERS', 10_000)
  texts = [f'text number {i}' for i in range(10_000)]
  sample = tokenizer_module._sample_texts(iter(texts))
  assert 2_500 < sum(map(len, sample)) <= 10_000
  # From all over the texts, and whatever their order.
  assert texts.index(sample[0]) < 1_000 and texts.index(sample[-1]) > 9_000
  assert sorted(tokenizer_module._sample_texts(texts[::-1])) == sorted(sample)


def test_training_takes_long_texts_into_account(model_bytes):
  line = 'unusual ' * 2_000
  pieces = Tokenizer(train_tokenizer([line], 270)).encode(' unusual')
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


@functools.cache
def load_mistral() -> Tokenizer:
  spec = importlib.util.find_spec('mistral_common')
  if spec is None:
    pytest.skip('mistral_common is not installed')
  folder = pathlib.Path(spec.submodule_search_locations[0])
  return Tokenizer.load(folder / 'data' / 'tokenizer.model.v1')


def build_fast_tokenizer(model_bytes: bytes):
  """Mistral's vocabulary in Hugging Face's implementation of the same rule."""
  tokenizers = pytest.importorskip('tokenizers')
  processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
  count = processor.get_piece_size()
  pieces = {processor.id_to_piece(i): i for i in range(count)}
  # A pair may merge if the result is a piece; better pieces first.
  merges = sorted(
    (-processor.get_score(i), piece[:cut], piece[cut:])
    for piece, i in pieces.items()
    if not (processor.is_control(i) or processor.is_byte(i))
    for cut in range(1, len(piece))
    if piece[:cut] in pieces and piece[cut:] in pieces
  )
  model = tokenizers.models.BPE(
    vocab=pieces,
    merges=[(left, right) for _, left, right in merges],
    unk_token='<unk>',
    fuse_unk=True,
    byte_fallback=True,
  )
  fast = tokenizers.Tokenizer(model)
  fast.normalizer = tokenizers.normalizers.Sequence(
    [
      tokenizers.normalizers.Prepend('▁'),
      tokenizers.normalizers.Replace(' ', '▁'),
    ]
  )
  fast.add_special_tokens(
    [
      tokenizers.AddedToken(literal, normalized=False, special=True)
      for literal in ('<unk>', '<s>', '</s>')
    ]
  )
  return fast


def test_mistral_ids_are_those_of_the_reference_implementation():
  ours = load_mistral()
  theirs = build_fast_tokenizer(ours.model_bytes)
  texts = make_nasty_texts(1_000)
  whole = sentencepiece.SentencePieceProcessor(model_proto=ours.model_bytes)
  expected = [
    item.ids for item in theirs.encode_batch(texts, add_special_tokens=False)
  ]
  assert ours.encode_batch(texts) == expected
  # The texts would show it if the rule were sentencepiece's own.
  differing = sum(
    a != b for a, b in zip(whole.encode(texts), expected, strict=True)
  )
  assert differing > len(texts) / 4


def test_mistral_fulfils_what_the_format_needs():
  mistral = load_mistral()
  assert (mistral.vocab_size, mistral.newline) == (32_000, 13)
  for text in make_nasty_texts(300):
    assert mistral.encode(text).count(13) == text.count('\n')
