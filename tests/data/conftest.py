"""Tiny tokenizers for the tests of data code, of each form there is."""

import argparse
import inspect
import json
import pathlib
import random
from collections.abc import Callable

import pytest
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)
from tokenizers import Tokenizer as Backend

from grit_jax.data.tokenizer import (
  JsonTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
)
from grit_jax.data.tokenizer_training import train_tokenizer

# What nasty texts are made of: everything that a tokenizer could treat in its
# own way.
ATOMS = (
  '<s> </s> <unk> <s </s s> <|user|> <|embed|> <|assistant|> <0x0A> hello '
  'Hello World x y 123 4.5 é ß 日本語 🙂 👩‍👩‍👧 ▁ _ < > | : \\ \' " def return '
  "self <|begin_of_text|> <|end_of_text|> <|end_of_ _text|> 's I'll"
).split() + [' ', '  ', '\n', '\n\n', '\t', '\r\n', '\u00a0', '\u2028', ' a']

# How Llama 3 parts a text into words: newlines go with what precedes them.
LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
LLAMA3_SPECIAL = ['<|begin_of_text|>', '<|end_of_text|>', '<|reserved_0|>']


@pytest.fixture(scope='session')
def make_nasty_texts() -> Callable[..., list[str]]:
  """Writes texts that are hard to tokenize, always the same."""

  def write(count: int, longest: int = 12) -> list[str]:
    rng = random.Random(0)
    return [
      ''.join(rng.choices(ATOMS, k=rng.randint(1, longest)))
      for _ in range(count)
    ]

  return write


@pytest.fixture(scope='session')
def model_bytes() -> bytes:
  """A sentencepiece model of 500 pieces."""
  return train_tokenizer([inspect.getsource(argparse)], 500)


@pytest.fixture(scope='session')
def tokenizer(model_bytes: bytes) -> SentencePieceTokenizer:
  """The tokenizer of that model."""
  return SentencePieceTokenizer(model_bytes)


def special_tokens(*literals: str) -> list[AddedToken]:
  return [
    AddedToken(literal, normalized=False, special=True) for literal in literals
  ]


def begin_with(literal: str, index: int) -> processors.TemplateProcessing:
  return processors.TemplateProcessing(
    single=f'{literal} $A', special_tokens=[(literal, index)]
  )


def read_sources() -> list[str]:
  """A part of the standard library, which every machine has."""
  paths = sorted(pathlib.Path(inspect.getfile(argparse)).parent.glob('*.py'))
  return [path.read_text('utf-8') for path in paths[:60]]


def train_llama3() -> Backend:
  backend = Backend(models.BPE(ignore_merges=True))
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(LLAMA3_WORDS), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=3000,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  # What the format and its boundaries are made of, for tokens that merge it.
  prompts = [f'<|embed|>{end}' for end in ('\n', '\n\n', '\n\n\n')] * 200
  backend.train_from_iterator([*read_sources(), *prompts], trainer)
  backend.add_special_tokens(special_tokens(*LLAMA3_SPECIAL))
  bos = LLAMA3_SPECIAL[0]
  backend.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=True),
      begin_with(bos, backend.token_to_id(bos)),
    ]
  )
  return backend


def train_llama2() -> Backend:
  normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  trained = Backend(models.BPE())
  trained.normalizer = normalizer
  trainer = trainers.BpeTrainer(
    vocab_size=1000, max_token_length=12, show_progress=False
  )
  # No piece holds a newline.
  lines = [line for text in read_sources()[:20] for line in text.splitlines()]
  trained.train_from_iterator(lines, trainer)
  model = json.loads(trained.to_str())['model']
  learned = sorted(model['vocab'], key=model['vocab'].get)
  literals = ['<unk>', '<s>', '</s>']
  pieces = [*literals, *(f'<0x{i:02X}>' for i in range(256)), *learned]
  backend = Backend(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=[tuple(merge) for merge in model['merges']],
      unk_token='<unk>',
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  backend.normalizer = normalizer
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  backend.add_special_tokens(special_tokens(*literals))
  backend.post_processor = begin_with('<s>', 1)
  return backend


def write_files(backend: Backend, **config: object) -> dict[str, bytes]:
  """The files that Hugging Face publishes, besides those of the model."""
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', **config}
  return {
    'tokenizer.json': backend.to_str().encode(),
    'tokenizer_config.json': json.dumps(config).encode(),
  }


@pytest.fixture(scope='session')
def llama3_files() -> dict[str, bytes]:
  """The files of a byte-level tokenizer of Llama 3's form."""
  bos, eos, _ = LLAMA3_SPECIAL
  return write_files(
    train_llama3(), bos_token=bos, eos_token=eos, model_max_length=131072
  )


@pytest.fixture(scope='session')
def llama2_files() -> dict[str, bytes]:
  """The files of a tokenizer of Llama 2's form, with byte fallback."""
  return write_files(
    train_llama2(),
    bos_token={'__type': 'AddedToken', 'content': '<s>', 'lstrip': False},
    eos_token={'__type': 'AddedToken', 'content': '</s>', 'lstrip': False},
    unk_token='<unk>',
  )


@pytest.fixture(scope='session')
def llama3(llama3_files: dict[str, bytes]) -> Tokenizer:
  """The tokenizer of Llama 3's form."""
  return JsonTokenizer(llama3_files)


@pytest.fixture(scope='session')
def llama2(llama2_files: dict[str, bytes]) -> Tokenizer:
  """The tokenizer of Llama 2's form."""
  return JsonTokenizer(llama2_files)


@pytest.fixture(scope='session')
def llama3_bytes(llama3_files: dict[str, bytes]) -> dict[int, bytes]:
  """The bytes of each token of Llama 3's form, from the file alone."""
  # The characters that a byte-level vocabulary writes for bytes.
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in plain]
  table = {chr(byte): byte for byte in plain}
  table |= {chr(256 + i): byte for i, byte in enumerate(others)}
  content = json.loads(llama3_files['tokenizer.json'])
  found = {
    index: bytes(table[character] for character in piece)
    for piece, index in content['model']['vocab'].items()
  }
  added = content['added_tokens']
  return found | {token['id']: token['content'].encode() for token in added}
