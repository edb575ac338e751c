"""Tests of writing a tokenizer as a tokenizer.json."""

import argparse
import importlib.util
import inspect
import io
import json
import pathlib
import random
from collections.abc import Sequence

import pytest
import sentencepiece
import tokenizers

from grit_jax.convert.tokenizer_files import tokenizer_json
from grit_jax.data.tokenizer import (
  JsonTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
  TokenizerError,
  load_tokenizer,
)
from grit_jax.data.tokenizer_training import train_tokenizer

ATOMS = (
  '<s> </s> <unk> <s </s s> /s> <unk unk> < > <0x0A> <0xFF> <|user|> '
  '<|embed|> <|assistant|> <|user <|em hello Hello HELLO world the x yz 123 '
  '4.5 -7 é ß ñ Å 日本語 漢 Привет мир שלום مرحبا हिन्दी ไทย 한국어 🙂 👩‍👩‍👧'
  ' 🇩🇪 ▁ '
  '▁▁ _ | : \\ \' " def return self http://a.b/c?d=e& {} [] ﬁ ½ Ａ e\u0301'
).split() + ['\n', '\r\n', '\t', ' ', '  ', ' a', '\u00a0', '\u3000', '\u2028']
BLANKS = ' \n\t\r\v\f▁'


def draw_character(rng: random.Random) -> str:
  """A character of any plane, half of them of the first; no surrogate."""
  highest = rng.choice([0x7F, 0x250, 0xFFFF, 0x10FFFF])
  code = rng.randint(1, highest)
  return 'ー' if 0xD800 <= code < 0xE000 else chr(code)


def make_nasty_texts(count: int) -> list[str]:
  """Writes texts that are hard to tokenize, always the same."""
  rng = random.Random(0)

  def write() -> str:
    kind = rng.random()
    if kind < 0.15:
      return draw_character(rng)
    if kind < 0.3:
      return rng.choice(BLANKS) * rng.randint(1, 40)
    if kind < 0.4:
      atom = rng.choice(ATOMS)
      return atom[rng.randint(0, len(atom)) :]
    return rng.choice(ATOMS)

  return [
    ''.join(write() for _ in range(rng.randint(1, 10))) for _ in range(count)
  ]


def write_folder(folder: pathlib.Path, tokenizer: Tokenizer) -> pathlib.Path:
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': tokenizer.bos_piece,
    'eos_token': tokenizer.eos_piece,
    'clean_up_tokenization_spaces': False,
  }
  (folder / 'tokenizer.json').write_bytes(tokenizer_json(tokenizer))
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture(scope='module')
def mistral() -> SentencePieceTokenizer:
  spec = importlib.util.find_spec('mistral_common')
  if spec is None:
    pytest.skip('mistral_common is not installed')
  folder = pathlib.Path(spec.submodule_search_locations[0])
  return load_tokenizer(folder / 'data' / 'tokenizer.model.v1')


@pytest.fixture(scope='module')
def trained() -> SentencePieceTokenizer:
  source = inspect.getsource(argparse) + inspect.getsource(inspect)
  return SentencePieceTokenizer(train_tokenizer([source], 1200))


def test_mistral_ids_are_those_of_transformers(mistral, tmp_path):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoTokenizer.from_pretrained(
    write_folder(tmp_path, mistral)
  )
  texts = make_nasty_texts(24_000)
  assert len(set(texts)) >= 20_000
  # The library would keep its strings and positions for all texts at once.
  for start in range(0, len(texts), 2_000):
    batch = texts[start : start + 2_000]
    expected = theirs(batch, add_special_tokens=False)['input_ids']
    assert mistral.encode_batch(batch) == expected
  with_bos = theirs(texts[:2_000])['input_ids']
  expected = mistral.encode_batch(texts[:2_000])
  assert with_bos == [[1, *ids] for ids in expected]


def test_the_texts_would_show_another_rule(mistral):
  texts = make_nasty_texts(2_000)
  whole = sentencepiece.SentencePieceProcessor(
    model_proto=mistral.files['tokenizer.model']
  )
  pairs = zip(whole.encode(texts), mistral.encode_batch(texts), strict=True)
  assert sum(a != b for a, b in pairs) > len(texts) / 10


def test_runs_of_blanks_merge_like_in_sentencepiece(mistral):
  # Their pieces all have one score.
  written = tokenizers.Tokenizer.from_buffer(tokenizer_json(mistral))
  texts = [
    before + ' ' * count + after
    for count in range(80)
    for before in ('', 'a', '\n', '<s>', 'é\n  x')
    for after in ('', 'a', '\n', '🙂', ' return', '.', '</s>', '\n' + ' ' * 19)
  ]
  found = written.encode_batch(texts, add_special_tokens=False)
  assert [item.ids for item in found] == mistral.encode_batch(texts)


def test_a_trained_model_gives_the_same_ids(trained):
  written = tokenizers.Tokenizer.from_buffer(tokenizer_json(trained))
  texts = make_nasty_texts(6_000)
  texts += [text * 3 for text in inspect.getsource(random).splitlines()]
  expected = trained.encode_batch(texts)
  found = written.encode_batch(texts, add_special_tokens=False)
  assert [item.ids for item in found] == expected
  found = written.encode_batch(texts)
  assert [item.ids for item in found] == [[1, *ids] for ids in expected]
  assert written.get_vocab_size() == trained.vocab_size
  pairs = written.encode_batch([('a', 'b')])
  assert pairs[0].ids == [1, *trained.encode('a'), 1, *trained.encode('b')]


def test_what_is_written_reads_back_as_the_same_tokenizer(trained, tmp_path):
  again = load_tokenizer(write_folder(tmp_path, trained))
  assert isinstance(again, JsonTokenizer)
  for name in 'bos', 'eos', 'bos_piece', 'eos_piece', 'vocab_size':
    assert getattr(again, name) == getattr(trained, name)
  texts = make_nasty_texts(3_000)
  batch = [
    [first + '\n', second + '</s>', '', '\n' + third + '\n', last]
    for first, second, third, last in zip(*[iter(texts)] * 4, strict=True)
  ]
  # One counts newlines, the other has the positions of tokens.
  for (ids, part), (other_ids, other_part) in zip(
    trained.encode_parts_batch(batch),
    again.encode_parts_batch(batch),
    strict=True,
  ):
    assert ids.tolist() == other_ids.tolist()
    assert part.tolist() == other_part.tolist()
  for ids in trained.encode_batch(texts):
    if trained.unk not in ids:  # It is ⁇ to sentencepiece alone.
      assert again.decode(ids) == trained.decode(ids)


def train(texts: Sequence[str], **options: object) -> SentencePieceTokenizer:
  """Trains a small model with settings that differ from ours."""
  model = io.BytesIO()
  settings = dict(
    model_type='bpe',
    vocab_size=500,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=3,
  )
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, **(settings | options)
  )
  return SentencePieceTokenizer(model.getvalue())


def test_no_merge_makes_what_sentencepiece_spells_out():
  # Both halves of a control token and of a byte token are pieces.
  texts = ['x[IN y[IN z[IN xST] yST] zST] x<0x y<0x z<0x x0A> y0A> z0A>'] * 9
  tokenizer = train(
    texts,
    vocab_size=285,
    control_symbols=['[INST]'],
    split_by_unicode_script=False,
    split_by_number=False,
  )
  document = json.loads(tokenizer_json(tokenizer))
  assert {'[IN', 'ST]', '<0x', '0A>'} <= set(document['model']['vocab'])
  written = tokenizers.Tokenizer.from_str(json.dumps(document))
  text = 'x[INST]<0x0A>'
  pieces = written.encode(text, add_special_tokens=False).tokens
  assert pieces[-4:] == ['[IN', 'ST]', '<0x', '0A>']
  ids = [written.token_to_id(piece) for piece in pieces]
  assert tokenizer.encode(text) == ids


def test_merges_are_written_for_older_readers(trained):
  merges = json.loads(tokenizer_json(trained))['model']['merges']
  assert all(merge.count(' ') == 1 for merge in merges)


@pytest.mark.parametrize(
  'options',
  [
    dict(model_type='unigram'),
    dict(add_dummy_prefix=False),
    dict(user_defined_symbols=['[REFERENCE]']),
    dict(normalization_rule_tsv='a_rule'),
  ],
  ids=str,
)
def test_another_kind_of_model_is_refused(options, tmp_path):
  if 'normalization_rule_tsv' in options:
    (tmp_path / 'rule.tsv').write_text('FB01\t66 69\n')
    options = dict(normalization_rule_tsv=str(tmp_path / 'rule.tsv'))
  lines = inspect.getsource(argparse).splitlines()
  with pytest.raises(TokenizerError, match='cannot be written as a tokeni'):
    tokenizer_json(train(lines, **options))
  tokenizer_json(train(lines))


def make_byte_level(**fields: object) -> JsonTokenizer:
  """A tokenizer.json of bytes alone, with some fields replaced."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {character: i for i, character in enumerate(alphabet)}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(['[BOS]', '[EOS]'])
  config = {'bos_token': '[BOS]', 'eos_token': '[EOS]'}
  # With a blank that `json.dumps` would not write.
  document = json.dumps(json.loads(backend.to_str()) | fields) + ' '
  return JsonTokenizer(
    {
      'tokenizer.json': document.encode(),
      'tokenizer_config.json': json.dumps(config).encode(),
    }
  )


def make_template(*pieces: str) -> dict:
  ids = {'[BOS]': 256, '[EOS]': 257}
  single = [
    {'SpecialToken': {'id': piece, 'type_id': 0}}
    if piece in ids
    else {'Sequence': {'id': 'A', 'type_id': 0}}
    for piece in pieces
  ]
  return {
    'type': 'TemplateProcessing',
    'single': single,
    'pair': [*single, {'Sequence': {'id': 'B', 'type_id': 1}}],
    'special_tokens': {
      piece: {'id': piece, 'ids': [index], 'tokens': [piece]}
      for piece, index in ids.items()
    },
  }


TRIM = {
  'type': 'ByteLevel',
  'add_prefix_space': False,
  'trim_offsets': True,
  'use_regex': True,
}
GOOD = make_template('[BOS]', 'text')
TRUNCATION = dict(
  direction='Right', max_length=3, strategy='LongestFirst', stride=0
)


@pytest.mark.parametrize(
  'processor', [GOOD, {'type': 'Sequence', 'processors': [TRIM, GOOD]}]
)
def test_a_complete_file_is_left_as_it_is(processor):
  tokenizer = make_byte_level(post_processor=processor)
  assert tokenizer_json(tokenizer) == tokenizer.files['tokenizer.json']


@pytest.mark.parametrize(
  'processor',
  [
    None,
    TRIM,
    make_template('text'),
    make_template('text', '[EOS]'),
    make_template('[BOS]', 'text', '[EOS]'),
    make_template('[BOS]', '[BOS]', 'text'),
    {
      'type': 'Sequence',
      'processors': [TRIM, make_template('[BOS]', 'text', '[EOS]')],
    },
    {
      'type': 'RobertaProcessing',
      'sep': ['[EOS]', 257],
      'cls': ['[BOS]', 256],
      'trim_offsets': True,
      'add_prefix_space': False,
    },
    {'type': 'Sequence', 'processors': []},
  ],
)
def test_one_bos_is_put_in_front_and_nothing_behind(processor):
  tokenizer = make_byte_level(post_processor=processor)
  data = tokenizer_json(tokenizer)
  written = tokenizers.Tokenizer.from_buffer(data)
  for text in 'some text', ' é\n[EOS]', '[BOS]a', '':
    ids = tokenizer.encode(text)
    assert written.encode(text).ids == [tokenizer.bos, *ids]
    assert written.encode(text, add_special_tokens=False).ids == ids
  # What else the post-processor does is kept.
  trims = 'ByteLevel' in json.dumps(processor)
  assert written.encode(' ').offsets[1] == ((1, 1) if trims else (0, 1))
  # Written once more, it is complete.
  files = tokenizer.files | {'tokenizer.json': data}
  assert tokenizer_json(JsonTokenizer(files)) == data


def test_truncation_and_padding_are_taken_out():
  padding = dict(
    strategy={'Fixed': 64},
    direction='Left',
    pad_to_multiple_of=None,
    pad_id=0,
    pad_type_id=0,
    pad_token='!',
  )
  tokenizer = make_byte_level(
    post_processor=GOOD, truncation=TRUNCATION, padding=padding
  )
  data = tokenizer_json(tokenizer)
  document = json.loads(data)
  assert (document['truncation'], document['padding']) == (None, None)
  written = tokenizers.Tokenizer.from_buffer(data)
  assert len(written.encode('seven').ids) == 6
  original = json.loads(tokenizer.files['tokenizer.json'])
  assert document == original | {'truncation': None, 'padding': None}
