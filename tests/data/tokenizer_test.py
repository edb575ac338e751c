"""Tests of both kinds of tokenizers."""

import hashlib
import importlib.util
import io
import json
import pathlib
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import sentencepiece

from grit_jax.data.tokenizer import (
  JsonTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
  TokenizerError,
  load_tokenizer,
  make_tokenizer,
)

# Fixtures of tokenizers, one of each form.
FORMS = ['tokenizer', 'llama3', 'llama2']
# A line of the file that Llama 3 has under the name of tokenizer.model.
TIKTOKEN = b''.join(b'aGVsbG8%d= %d\n' % (i, i) for i in range(300))


@pytest.fixture(params=FORMS)
def any_tokenizer(request) -> Tokenizer:
  return request.getfixturevalue(request.param)


@pytest.fixture
def nasty_texts(make_nasty_texts) -> list[str]:
  return make_nasty_texts(500)


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


def write_folder(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return folder


def change(files: dict[str, bytes], name: str, **fields) -> dict[str, bytes]:
  """The files with fields of one of them replaced."""
  content = json.loads(files[name]) | fields
  return files | {name: json.dumps(content).encode()}


# Of every kind.


def test_special_tokens_have_their_ids_and_literals(
  tokenizer, llama3, llama2, llama3_files
):
  assert (tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
  assert (tokenizer.bos_piece, tokenizer.eos_piece) == ('<s>', '</s>')
  assert tokenizer.vocab_size == 500
  assert (llama2.unk, llama2.bos, llama2.eos) == (0, 1, 2)
  assert (llama2.bos_piece, llama2.eos_piece) == ('<s>', '</s>')
  vocabulary = json.loads(llama3_files['tokenizer.json'])['model']['vocab']
  size = len(vocabulary)
  assert (llama3.unk, llama3.bos, llama3.eos) == (None, size, size + 1)
  assert llama3.bos_piece == '<|begin_of_text|>'
  assert llama3.eos_piece == '<|end_of_text|>'
  # The reserved token, too, has a row of the embedding.
  assert llama3.vocab_size == size + 3


def test_literals_of_special_tokens_are_special_wherever_they_stand(
  any_tokenizer,
):
  bos, eos = any_tokenizer.bos_piece, any_tokenizer.eos_piece
  ids = any_tokenizer.encode(f'{bos}a{eos}{eos}b{bos}')
  special = [any_tokenizer.bos, any_tokenizer.eos, any_tokenizer.eos]
  special += [any_tokenizer.bos]
  assert [index for index in ids if index in special] == special
  assert (ids[0], ids[-1]) == (any_tokenizer.bos, any_tokenizer.bos)


def test_nothing_is_added(any_tokenizer):
  assert any_tokenizer.encode('') == []
  special = {any_tokenizer.bos, any_tokenizer.eos}
  assert not special & set(any_tokenizer.encode('a text'))


@pytest.mark.parametrize('num_threads', [1, 2, -1])
def test_a_batch_is_encoded_like_its_texts(
  any_tokenizer, nasty_texts, num_threads
):
  texts = ['', *nasty_texts]
  assert any_tokenizer.encode_batch(texts, num_threads) == [
    any_tokenizer.encode(text) for text in texts
  ]
  assert any_tokenizer.encode_batch([], num_threads) == []


def test_texts_without_literals_come_back_whole(any_tokenizer, nasty_texts):
  for text in nasty_texts:
    for literal in '<s>', '</s>', '<unk>', '<|begin_of_text|>':
      text = text.replace(literal, '')
    text = text.replace(any_tokenizer.eos_piece, '')
    # sentencepiece writes a blank as ▁, and reads both back as a blank.
    text = text.replace('▁', ' ')
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_decoding_drops_the_ends_of_a_prompt(any_tokenizer):
  text = any_tokenizer.bos_piece + 'an answer' + any_tokenizer.eos_piece
  ids = any_tokenizer.encode(text)
  assert any_tokenizer.decode(ids) == 'an answer'
  assert any_tokenizer.decode(np.array(ids, np.int32)) == 'an answer'


def test_a_tokenizer_survives_pickling(any_tokenizer, nasty_texts):
  copy = pickle.loads(pickle.dumps(any_tokenizer))
  assert type(copy) is type(any_tokenizer)
  assert copy.fingerprint == any_tokenizer.fingerprint
  assert copy.encode_batch(nasty_texts) == any_tokenizer.encode_batch(
    nasty_texts
  )


def test_a_tokenizer_is_made_from_its_files(any_tokenizer):
  copy = make_tokenizer(any_tokenizer.files, 'a checkpoint')
  assert copy.files == any_tokenizer.files
  assert copy.fingerprint == any_tokenizer.fingerprint
  for name in 'bos', 'eos', 'unk', 'bos_piece', 'eos_piece', 'vocab_size':
    assert getattr(copy, name) == getattr(any_tokenizer, name)


def test_files_of_no_tokenizer_are_refused():
  message = "a checkpoint: found \\['a.txt'\\], expected tokenizer.model or"
  with pytest.raises(TokenizerError, match=message):
    make_tokenizer({'a.txt': b''}, 'a checkpoint')


# Parts.


def cut_at_newlines(texts: Sequence[str], eos: str) -> list[list[str]]:
  """Texts in parts that every tokenizer can tell apart, some empty."""
  batch = []
  for i in range(0, len(texts), 4):
    first, second, third, last = texts[i : i + 4]
    batch.append([first + '\n', second + eos, '', third + '\n', last])
    batch.append(['', first, ''][: 2 + (not first)])
    batch.append([eos, '\n', f'\n{first}{eos}', ''])
  return batch


def test_the_ids_of_parts_are_those_of_the_joined_text(
  any_tokenizer, nasty_texts
):
  batch = cut_at_newlines(nasty_texts, any_tokenizer.eos_piece)
  encoded = any_tokenizer.encode_parts_batch(batch)
  assert len(encoded) == len(batch)
  for parts, (ids, part) in zip(batch, encoded, strict=True):
    assert ids.tolist() == any_tokenizer.encode(''.join(parts))
    assert (ids.dtype, part.dtype) == (np.int32, np.int32)
    assert len(part) == len(ids)
    assert (np.diff(part) >= 0).all()
    alone_ids, alone_part = any_tokenizer.encode_parts(parts)
    assert alone_ids.tolist() == ids.tolist()
    assert alone_part.tolist() == part.tolist()


def test_empty_parts_have_no_tokens(any_tokenizer):
  ids, part = any_tokenizer.encode_parts(['', 'a\n', '', '', 'b'])
  assert set(part.tolist()) == {1, 4}
  assert any_tokenizer.decode(ids[part == 4]).strip() == 'b'
  for parts in [], [''], ['', '', '']:
    ids, part = any_tokenizer.encode_parts(parts)
    assert (len(ids), len(part)) == (0, 0)
  assert any_tokenizer.encode_parts_batch([]) == []


def test_sentencepiece_parts_end_where_their_tokens_alone_do(
  tokenizer, nasty_texts
):
  for parts in cut_at_newlines(nasty_texts, '</s>'):
    _, part = tokenizer.encode_parts(parts)
    for i in range(len(parts)):
      # What follows a newline or `</s>` does not change what precedes.
      before = tokenizer.encode(''.join(parts[:i]))
      assert np.count_nonzero(part < i) == len(before)


def test_the_dummy_prefix_after_eos_belongs_to_the_next_part(tokenizer, llama2):
  for each in tokenizer, llama2:
    ids, part = each.encode_parts(['a</s>', '\nb'])
    eos = ids.tolist().index(each.eos)
    newline = ids.tolist().index(each.encode('\n')[-1])
    assert newline == eos + 2
    assert part[eos : newline + 1].tolist() == [0, 1, 1]


def test_sentencepiece_parts_must_end_where_tokens_do(tokenizer, llama3):
  parts = ['a\n', 'some text', 'b']
  with pytest.raises(ValueError, match="the part 'some text' ends neither in"):
    tokenizer.encode_parts(parts)
  _, part = llama3.encode_parts(parts)
  assert set(part.tolist()) == {0, 1, 2}


def test_tokens_of_bytes_belong_where_they_begin(
  llama3, make_nasty_texts, llama3_bytes
):
  straddling = 0
  # Boundaries that no tokenizer would choose.
  for parts in zip(*[iter(make_nasty_texts(4_000))] * 4, strict=True):
    ids, part = llama3.encode_parts(parts)
    ends = np.cumsum([len(text.encode()) for text in parts])
    start, expected = 0, []
    for index in ids.tolist():
      expected.append(np.searchsorted(ends, start, side='right'))
      stop = start + len(llama3_bytes[index])
      straddling += int(stop > ends[expected[-1]])
      start = stop
    assert start == ends[-1]
    assert part.tolist() == expected
  assert straddling > 50


def test_leading_blanks_of_a_token_count(llama3):
  # The file's post-processor takes them out of the positions.
  ids, part = llama3.encode_parts(['a', ' self', '  ', 'x', ' '])
  text = [llama3.decode([index]) for index in ids]
  assert text == ['a', ' self', ' ', ' x', ' ']
  assert part.tolist() == [0, 1, 2, 2, 4]


# A sentencepiece model.


def test_each_piece_between_literals_is_encoded_by_itself(tokenizer):
  parts = [tokenizer.encode(text) for text in ('one', ' two', 'three')]
  ids = tokenizer.encode('one<s> two</s>three<unk>')
  assert ids == [*parts[0], 1, *parts[1], 2, *parts[2], 0]


def test_every_newline_is_one_token(tokenizer, nasty_texts):
  for text in nasty_texts:
    assert tokenizer.encode(text).count(tokenizer.newline) == text.count('\n')


def test_what_follows_a_newline_does_not_change_what_precedes(
  tokenizer, nasty_texts
):
  for prefix, text in zip(nasty_texts[::2], nasty_texts[1::2], strict=True):
    start = tokenizer.encode(prefix + '\n')
    assert tokenizer.encode(prefix + '\n' + text)[: len(start)] == start


def test_the_fingerprint_of_a_model_is_that_of_its_bytes(model_bytes):
  # Data sets that were prepared by older versions are kept under it.
  expected = hashlib.sha256(model_bytes).hexdigest()
  assert SentencePieceTokenizer(model_bytes).fingerprint == expected


@pytest.mark.parametrize('data', [b'no model', b'', TIKTOKEN])
def test_a_file_that_is_no_model_is_named(tmp_path, data):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=f'{path}: not a sentencepiece model'):
    load_tokenizer(path)


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
  with pytest.raises(TokenizerError, match=message):
    SentencePieceTokenizer(model)


def test_mistral_fulfils_what_the_format_needs(nasty_texts):
  spec = importlib.util.find_spec('mistral_common')
  if spec is None:
    pytest.skip('mistral_common is not installed')
  folder = pathlib.Path(spec.submodule_search_locations[0])
  mistral = load_tokenizer(folder / 'data' / 'tokenizer.model.v1')
  assert (mistral.vocab_size, mistral.newline) == (32_000, 13)
  for text in nasty_texts:
    assert mistral.encode(text).count(13) == text.count('\n')


# A tokenizer.json.


@pytest.mark.parametrize('form', ['llama3', 'llama2'])
def test_ids_are_those_of_transformers(
  request, tmp_path, make_nasty_texts, form
):
  transformers = pytest.importorskip('transformers')
  files = request.getfixturevalue(f'{form}_files')
  folder = write_folder(tmp_path / form, files)
  texts = make_nasty_texts(4_000, longest=24)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  expected = theirs(texts, add_special_tokens=False)['input_ids']
  ours = load_tokenizer(folder)
  assert ours.encode_batch(texts) == expected
  assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)


def test_what_the_file_cuts_and_pads_is_not(llama3, llama3_files):
  limits = dict(
    truncation=dict(
      direction='Right', max_length=4, strategy='LongestFirst', stride=0
    ),
    padding=dict(
      strategy={'Fixed': 64},
      direction='Left',
      pad_to_multiple_of=None,
      pad_id=0,
      pad_type_id=0,
      pad_token='!',
    ),
  )
  limited = JsonTokenizer(change(llama3_files, 'tokenizer.json', **limits))
  text = 'one two three four five six seven'
  assert limited.encode(text) == llama3.encode(text)
  assert limited.encode_batch([text, 'a']) == llama3.encode_batch([text, 'a'])
  [ids, _] = limited.encode_parts([text])
  assert ids.tolist() == llama3.encode(text)


def test_only_what_is_needed_is_kept(llama3, llama3_files):
  assert llama3.files['tokenizer.json'] == llama3_files['tokenizer.json']
  assert set(llama3.files) == {'tokenizer.json', 'tokenizer_config.json'}
  assert json.loads(llama3.files['tokenizer_config.json']) == {
    'bos_token': '<|begin_of_text|>',
    'eos_token': '<|end_of_text|>',
  }
  # Data sets are kept under the fingerprint, which the rest cannot change.
  other = change(llama3_files, 'tokenizer_config.json', model_max_length=1)
  assert JsonTokenizer(other).fingerprint == llama3.fingerprint
  eos = change(
    llama3_files, 'tokenizer_config.json', eos_token='<|reserved_0|>'
  )
  assert JsonTokenizer(eos).fingerprint != llama3.fingerprint


def test_older_folders_name_the_special_tokens_elsewhere(llama3, llama3_files):
  files = {
    'tokenizer.json': llama3_files['tokenizer.json'],
    'special_tokens_map.json': json.dumps(
      {
        'bos_token': {'content': '<|begin_of_text|>'},
        'eos_token': '<|reserved_0|>',
      }
    ).encode(),
  }
  other = JsonTokenizer(files)
  assert (other.bos, other.eos) == (llama3.bos, llama3.vocab_size - 1)
  files['tokenizer_config.json'] = json.dumps(
    {'bos_token': None, 'eos_token': '<|end_of_text|>'}
  ).encode()
  both = JsonTokenizer(files)
  assert (both.bos, both.eos) == (llama3.bos, llama3.eos)


CONFIG = 'tokenizer_config.json'
STRIP = {'type': 'Strip', 'strip_left': True, 'strip_right': True}
LOWERED = {'type': 'Replace', 'pattern': {'String': '\n'}, 'content': ' '}
BAD_FILES = {
  'no bos': (CONFIG, dict(bos_token=None), 'names a bos token'),
  'no eos': (CONFIG, dict(eos_token=None), 'names a eos token'),
  'no content': (CONFIG, dict(bos_token={}), 'names a bos token'),
  'unknown eos': (
    CONFIG,
    dict(eos_token='<|im_end|>'),
    r"the eos token '<\|im_end\|>' is not in the vocabulary",
  ),
  'an eos that is text': (
    CONFIG,
    dict(eos_token='e'),
    "the eos token 'e' is not found wherever a text has it",
  ),
  'an eos that no text gives': (
    CONFIG,
    dict(eos_token='Ġe'),
    "the eos token 'Ġe' is not found wherever a text has it",
  ),
  'blanks stripped': (
    'tokenizer.json',
    dict(normalizer=STRIP),
    r"'a\\n\\n b\\n' comes back as 'a\\n\\n b'",
  ),
  'newlines turned into blanks': (
    'tokenizer.json',
    dict(normalizer=LOWERED),
    r"comes back as 'a   b '",
  ),
  'no model': ('tokenizer.json', dict(model={}), 'not a tokenizer.json: '),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_a_json_file_that_the_format_cannot_use_is_refused(
  tmp_path, llama3_files, name
):
  file, fields, message = BAD_FILES[name]
  files = change(llama3_files, file, **fields)
  path = write_folder(tmp_path, files) / 'tokenizer.json'
  with pytest.raises(TokenizerError, match=f'{path}: .*{message}'):
    load_tokenizer(path)


@pytest.mark.parametrize(
  'name, data, message',
  [
    ('tokenizer.json', b'', 'not a tokenizer.json'),
    ('tokenizer.json', b'{"a', 'not a tokenizer.json'),
    ('tokenizer.json', b'\xff', 'not a tokenizer.json'),
    (CONFIG, b'{"a', f'{CONFIG}: not JSON'),
    (CONFIG, b'\xff', f'{CONFIG}: not JSON'),
    (CONFIG, b'[]', f'{CONFIG}: not a JSON object'),
  ],
)
def test_a_file_that_is_no_json_is_named(
  tmp_path, llama3_files, name, data, message
):
  folder = write_folder(tmp_path, llama3_files | {name: data})
  with pytest.raises(TokenizerError, match=f'{tmp_path}/.*: {message}'):
    load_tokenizer(folder)


@pytest.mark.parametrize('flags', [{'special': False}, {'single_word': True}])
def test_an_added_token_that_is_not_special_is_no_eos(llama3_files, flags):
  content = json.loads(llama3_files['tokenizer.json'])
  content['added_tokens'][1] |= flags
  files = change(llama3_files, 'tokenizer.json', **content)
  with pytest.raises(TokenizerError, match='eos .* is not found wherever'):
    JsonTokenizer(files)


def test_a_token_that_is_found_behind_blanks_alone_is_no_bos(llama2_files):
  # As files of Llama 2 have it that older programs wrote.
  content = json.loads(llama2_files['tokenizer.json'])
  for token in content['added_tokens']:
    token['normalized'] = True
  files = change(llama2_files, 'tokenizer.json', **content)
  with pytest.raises(TokenizerError, match='bos .* is not found wherever'):
    JsonTokenizer(files)


# Loading.


def test_a_tokenizer_is_loaded_from_its_file(
  tmp_path, model_bytes, llama3_files
):
  write_folder(tmp_path, llama3_files)
  path = tmp_path / 'any.name'
  path.write_bytes(model_bytes)
  assert load_tokenizer(path).files == {'tokenizer.model': model_bytes}
  found = load_tokenizer(str(tmp_path / 'tokenizer.json'))
  assert found.files['tokenizer.json'] == llama3_files['tokenizer.json']


def test_a_missing_file_is_named(tmp_path):
  for name in 'no.model', 'no.json', 'nowhere':
    with pytest.raises(FileNotFoundError, match=name):
      load_tokenizer(tmp_path / name)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
  message = f'{tmp_path}: .* looked for tokenizer.model and tokenizer.json'
  with pytest.raises(TokenizerError, match=message):
    load_tokenizer(tmp_path)


def test_a_tokenizer_json_alone_has_no_special_tokens(tmp_path, llama3_files):
  name = 'tokenizer.json'
  write_folder(tmp_path, {name: llama3_files[name]})
  message = f'{tmp_path}/{name}: neither {CONFIG} nor .* names a bos token'
  with pytest.raises(TokenizerError, match=message):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  'has_model, has_json, kind',
  [
    (True, False, SentencePieceTokenizer),
    (False, True, JsonTokenizer),
    (True, True, SentencePieceTokenizer),
  ],
)
def test_of_a_folder_the_model_is_preferred(
  tmp_path, model_bytes, llama2_files, has_model, has_json, kind
):
  if has_model:
    write_folder(tmp_path, {'tokenizer.model': model_bytes})
  if has_json:
    write_folder(tmp_path, llama2_files)
  assert type(load_tokenizer(tmp_path)) is kind


@pytest.mark.parametrize(
  'added, options, kind',
  [
    ('<s>', {}, SentencePieceTokenizer),
    ('[X]', {'user_defined_symbols': ['[X]']}, SentencePieceTokenizer),
    ('<|im_end|>', {}, JsonTokenizer),
    # In the model, but spelled out where a text has its literal.
    ('[INST]', {'control_symbols': ['[INST]']}, JsonTokenizer),
  ],
)
def test_tokens_that_the_model_lacks_need_the_json(
  tmp_path, llama2_files, added, options, kind
):
  token = dict(
    content=added,
    single_word=False,
    lstrip=False,
    rstrip=False,
    normalized=False,
    special=True,
  )
  content = json.loads(llama2_files['tokenizer.json'])
  literals = [known['content'] for known in content['added_tokens']]
  if added not in literals:
    size = len(content['model']['vocab'])
    content['added_tokens'].append(token | {'id': size})
  model = train(['hello hello world'] * 9, vocab_size=275, **options)
  files = change(llama2_files, 'tokenizer.json', **content)
  write_folder(tmp_path, files | {'tokenizer.model': model})
  assert type(load_tokenizer(tmp_path)) is kind


def test_a_folder_whose_model_is_of_another_format_has_the_json(
  tmp_path, llama3_files
):
  write_folder(tmp_path, {'tokenizer.model': TIKTOKEN})
  with pytest.raises(TokenizerError, match='tokenizer.model: not a sentence'):
    load_tokenizer(tmp_path)
  write_folder(tmp_path, llama3_files)
  assert type(load_tokenizer(tmp_path)) is JsonTokenizer


@pytest.mark.parametrize('damage', ['empty', 'half', 'text'])
def test_a_damaged_model_is_not_another_tokenizer(
  tmp_path, model_bytes, llama3_files, damage
):
  for name, data in llama3_files.items():
    (tmp_path / name).write_bytes(data)
  (tmp_path / 'tokenizer.model').write_bytes(
    {
      'empty': b'',
      'half': model_bytes[: len(model_bytes) // 2],
      'text': b'version https://git-lfs.github.com/spec/v1\n',
    }[damage]
  )
  with pytest.raises(TokenizerError, match='tokenizer.model'):
    load_tokenizer(tmp_path)
