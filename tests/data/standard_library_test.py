"""Tests of grit_jax/data/standard_library.py."""

import ast
import collections
import contextlib
import hashlib
import io
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from grit_jax.data import standard_library
from grit_jax.data.standard_library import Function

ROOT = pathlib.Path(__file__).parents[2]
# Fewer queries say little about retrieval: at 500 the standard error of a
# recall is up to 2.2%.
MINIMUM_TEST_RECORDS = 500
SPLITS = ('train', 'test')

# The hashes of their names say so.
TRAIN_MODULE, TEST_MODULE = 'argparse', 'inspect'

AWKWARD = '''
class Müller:
  """A class, whose docstring is nobody's answer."""

  try:
    @staticmethod  # A comment stays.
    @property
    def größe(x, *, y="ß"): "Größe of the mill wheel." ; return x  # ß
  except ValueError:
    async def wait(self, timeout=None):
      """Wait for the wheel.

      At length.
      """  # And this comment.

      # So does this one.
      text = """
hangs out to the left"""
      def inner():
        """Say nothing that is found."""
      return text, inner

def body_is_docstring(a,
                      b):
  """Return nothing at all."""

def undocumented(): return 1
def too_short(): """Two words."""
def shows():
  """>>> an example, not a description"""
'''
LARGE = 'def f(self):\n  return [{} for item in self.items if item is not None]'


def refuse(*_, **__):
  raise AssertionError('The builder used the network.')


@contextlib.contextmanager
def no_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(socket.socket, 'connect', refuse)
    patch.setattr(socket, 'getaddrinfo', refuse)
    yield


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The builders of both configs, built, and what they wrote to stderr."""
  folder, builders = tmp_path_factory.mktemp('data'), {}
  with (
    no_network(),
    contextlib.redirect_stderr(io.StringIO()) as stderr,
  ):
    for name in ('embedding', 'generative'):
      builders[name] = tfds.builder(
        f'standard_library/{name}',
        data_dir=folder,
        file_format='array_record',
      )
      builders[name].download_and_prepare()
  return builders, stderr.getvalue()


@pytest.fixture(scope='module')
def records(built):
  """All records by config and split, read back from disk."""
  with no_network():
    return {
      name: {
        split: [
          json.loads(example['json'])
          for example in builder.as_data_source(split)
        ]
        for split in SPLITS
      }
      for name, builder in built[0].items()
    }


@pytest.fixture(scope='module')
def functions():
  return standard_library.read_library()


def make_function(module, name='f', docstring='', source=''):
  return Function(
    module=module,
    name=name,
    signature=f'{name}(self)',
    docstring=docstring or f'Do what {name} of {module} does.',
    source=source or LARGE.format(f'{module}.{name}'),
  )


def normal(source):
  return ' '.join(source.split())


@pytest.mark.parametrize('config', ['embedding', 'generative'])
def test_builds_array_records_without_tensorflow_or_network(built, config):
  builder = built[0][config]
  files = [path.name for path in pathlib.Path(builder.data_dir).iterdir()]
  for split in SPLITS:
    assert any(f'-{split}.array_record-' in name for name in files)
    example = builder.as_data_source(split)[0]
    assert set(example) == {'json'}
    assert isinstance(example['json'], bytes)
  assert 'tensorflow' not in sys.modules


def test_building_draws_no_progress_bars(built):
  assert built[1] == ''


def test_folder_is_the_interpreters_own(built):
  _, minor, micro = platform.python_version_tuple()
  for builder in built[0].values():
    assert pathlib.Path(builder.data_dir).name.endswith(f'.{minor}.{micro}')


@pytest.mark.parametrize('split', SPLITS)
def test_embedding_records_have_the_reference_format(records, split):
  for record in records['embedding'][split]:
    assert list(record) == ['query', 'pos', 'neg']
    for instruction, text in [record['query'], *record['pos'], *record['neg']]:
      assert isinstance(instruction, str)
      assert isinstance(text, str) and text.strip()
    assert record['query'][0]
    assert len(record['pos']) == 1
    assert 1 <= len(record['neg']) <= standard_library.MAXIMUM_NEGATIVES
    # Documents of retrieval get no instruction.
    assert {text[0] for text in record['pos'] + record['neg']} == {''}


@pytest.mark.parametrize('split', SPLITS)
def test_generative_records_have_the_reference_format(records, split):
  for record in records['generative'][split]:
    assert list(record) == ['text']
    assert len(record['text']) in (2, 4)
    assert all(
      isinstance(turn, str) and turn.strip() for turn in record['text']
    )
  turns = collections.Counter(
    len(record['text']) for record in records['generative'][split]
  )
  assert turns[2] > turns[4] > 0


@pytest.mark.parametrize('split', SPLITS)
def test_a_choice_offers_its_answer_once(records, split):
  choices = [
    (prompt, answer)
    for record in records['generative'][split]
    for prompt, answer in zip(*[iter(record['text'])] * 2, strict=True)
    if prompt.startswith(standard_library.CHOOSE)
  ]
  # One for each function, and the second turns.
  assert len(choices) > len(records['generative'][split]) / 2
  for prompt, answer in choices:
    _, _, candidates = prompt.split('\n\n')
    names = [line.partition('(')[0] for line in candidates.split('\n')]
    assert names.count(answer) == 1
    assert len(names) > 1


def test_a_choice_never_offers_its_answer_twice():
  one, *others = (
    make_function(module, name)
    for module, name in (('abc', 'main'), ('ast', 'main'), ('ast', 'walk'))
  )
  prompt, answer = standard_library.choose(one, others)
  assert answer == 'main'
  assert prompt.count('main(') == 1
  assert prompt.count('walk(') == 1


@pytest.mark.parametrize('split', SPLITS)
def test_prompts_are_cut(records, split):
  # The instruction, a blank line and the mark of the cut besides.
  limit = standard_library.MAXIMUM_PROMPT_LINES + 3
  lines = [
    len(record['text'][0].split('\n'))
    for record in records['generative'][split][::2]
  ]
  assert max(lines) == limit


def test_records_on_disk_are_in_the_librarys_order(records, functions):
  for split in SPLITS:
    stored = [record['pos'][0][1] for record in records['embedding'][split]]
    assert stored == [function.source for function in functions[split]]


def test_test_split_is_large_and_its_queries_differ(records):
  test = records['embedding']['test']
  assert len(test) >= MINIMUM_TEST_RECORDS
  assert len({record['query'][1] for record in test}) == len(test)
  assert len({record['pos'][0][1] for record in test}) == len(test)
  assert len(test) < len(records['embedding']['train']) / 2


def test_splits_share_no_module(functions):
  train, test = (
    {function.module for function in functions[split]} for split in SPLITS
  )
  assert train and test
  assert train.isdisjoint(test)


def test_splits_share_no_source_and_no_query(records):
  texts = {
    split: {
      normal(text)
      for record in records['embedding'][split]
      for _, text in [record['query'], *record['pos'], *record['neg']]
    }
    for split in SPLITS
  }
  assert texts['train'].isdisjoint(texts['test'])


def test_what_is_in_test_or_trivial_is_dropped_from_train():
  same_source = make_function(TRAIN_MODULE, 'a', source=LARGE.format('item'))
  same_docstring = make_function(TRAIN_MODULE, 'b', docstring='Count the items')
  too_short = make_function(TRAIN_MODULE, 'f', source='def f(self): return 1')
  own = make_function(TRAIN_MODULE, 'c')
  test = [
    make_function(
      TEST_MODULE, 'd', source=LARGE.format('item').replace('  ', '    ')
    ),
    make_function(TEST_MODULE, 'e', docstring='count the items.'),
  ]
  splits = standard_library.split_functions(
    [same_source, same_docstring, too_short, own, *test],
    lambda one: one.module == TEST_MODULE,
  )
  assert splits == {'train': [own], 'test': test}


def test_docstring_is_not_in_its_source(functions):
  for split in SPLITS:
    for function in functions[split]:
      assert function.docstring not in normal(function.source)
      (node,) = ast.parse(function.source).body
      assert node.name == function.name.rpartition('.')[-1]


def test_source_keeps_all_but_the_docstring():
  size, wait, body = standard_library.parse_functions('mill', AWKWARD)
  assert (size.name, wait.name) == ('Müller.größe', 'Müller.wait')
  assert size.docstring == 'Größe of the mill wheel.'
  assert size.source == (
    '@staticmethod  # A comment stays.\n'
    '@property\n'
    'def größe(x, *, y="ß"): return x  # ß'
  )
  assert wait.docstring == 'Wait for the wheel.'
  assert wait.signature == 'Müller.wait(self, timeout=None)'
  assert wait.source == (
    'async def wait(self, timeout=None):\n'
    '  # And this comment.\n'
    '  # So does this one.\n'
    '  text = """\n'
    'hangs out to the left"""\n'
    '  def inner():\n'
    '    """Say nothing that is found."""\n'
    '  return text, inner'
  )
  assert body.source == (
    'def body_is_docstring(a,\n                      b):\n  pass'
  )


def test_negatives_are_of_the_same_module_where_it_has_another(
  records, functions
):
  for split in SPLITS:
    modules = {one.source: one.module for one in functions[split]}
    sizes = collections.Counter(modules.values())
    assert 1 in sizes.values()
    for record in records['embedding'][split]:
      positive = record['pos'][0][1]
      negatives = [text for _, text in record['neg']]
      assert positive not in negatives
      # All are of this split, or the lookup would raise.
      found = {modules[negative] for negative in negatives}
      if sizes[modules[positive]] > 1:
        assert found == {modules[positive]}


def test_a_lone_function_has_its_packages_as_neighbours_then_others():
  lone = make_function('email.charset', 'lone')
  package = [make_function('email.header', name) for name in 'ab']
  others = [make_function('bisect', name) for name in 'cd']
  (first, neighbours), *_ = standard_library.with_neighbours(
    [lone, *others, *package]
  )
  assert first is lone
  assert set(neighbours[:2]) == set(package)
  assert set(neighbours[2:]) == set(others)


def test_files_that_do_not_parse_or_decode_are_left_out(tmp_path, monkeypatch):
  text = '\n\n'.join(
    f'def {name}(items):\n  """Return {name} of the items."""\n'
    f'  return [{name} for item in items if item is not {name} and item]'
    for name in ('first', 'second')
  )
  (tmp_path / 'abc.py').write_text('def f(:')
  (tmp_path / 'ast.py').write_bytes(text.encode() + b'\n# \xff')
  # `items` becomes another word, so that none is dropped as a duplicate.
  for word, path in (
    ('pages', 'copy.py'),
    ('letters', 'email/charset.py'),
    ('cases', 'email/test/charset.py'),
    ('wheels', 'site-packages/csv.py'),
  ):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text.replace('items', word))
  logged = []
  monkeypatch.setattr(
    standard_library.sysconfig, 'get_path', lambda name: tmp_path
  )
  monkeypatch.setattr(
    standard_library.logging, 'info', lambda *texts: logged.extend(texts)
  )
  splits = standard_library.read_library.__wrapped__()
  assert [one.module for split in SPLITS for one in splits[split]] == [
    module for module in ('copy', 'email.charset') for _ in range(2)
  ]
  assert logged[1:] == [len(splits['train']), len(splits['test']), 2]


def test_records_do_not_depend_on_the_hash_seed():
  code = '\n'.join(
    [
      'import json, pathlib, sysconfig',
      'from grit_jax.data import standard_library as library',
      'root = pathlib.Path(sysconfig.get_path("stdlib"))',
      'functions = [',
      '  one for module, path in library.library_files(root)',
      '  if module in ("argparse", "bisect", "codeop", "csv", "inspect")',
      '  for one in library.parse_functions(module, path.read_text("utf-8"))',
      ']',
      'splits = library.split_functions(',
      '  functions, lambda one: library.in_test(one.module)',
      ')',
      'for split in splits.values():',
      '  print(json.dumps(list(library.embedding_records(split))))',
      '  print(json.dumps(list(library.generative_records(split))))',
    ]
  )
  digests = set()
  for seed in ('1', '2'):
    output = subprocess.run(
      [sys.executable, '-c', code],
      cwd=ROOT,
      env={**os.environ, 'PYTHONHASHSEED': seed},
      capture_output=True,
      check=True,
    ).stdout
    assert output.count(b'\n') == 4 and b'def bisect' in output
    digests.add(hashlib.sha256(output).hexdigest())
  assert len(digests) == 1
