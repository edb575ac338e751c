"""Training data from the standard library of the running Python, offline.

`StandardLibrary` is a TFDS builder over its functions that have a docstring:

    builder = tfds.builder(
      'standard_library/embedding', data_dir=..., file_format='array_record'
    )
    builder.download_and_prepare()
    builder.as_data_source('train')[0]['json']  # One record, as bytes.

Each example is one JSON object, as in a line of the reference's data files:

- `embedding`: `{"query": [instruction, docstring], "pos": [["", source]],
  "neg": [["", source of another function], ...]}`, one for each function. (To
  ask for functions by name or for signatures as well, in train, was tried with
  a bag of embeddings: it found no more of test.)
- `generative`: `{"text": [user, assistant, ...]}`. Each function gives a
  conversation that asks for the docstring of its source, and one that asks
  which of a few signatures its docstring describes. In every third the first
  goes on with a second turn of the other kind, about a neighbour.

A module is in one split, by the hash of its name, and negatives come from the
same split. The docstring is its first paragraph; the source is without any of
it. What occurs twice (a docstring, a source, a name in a module) is kept once,
so that a query has one right answer and nothing of test is in train.
"""

import ast
import dataclasses
import functools
import json
import pathlib
import re
import sys
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow_datasets as tfds
from absl import logging

# Of the modules, by the hash of their names: 862 functions of 5,430 on Python
# 3.11, and 818 of 5,241 on 3.12.
TEST_PERCENT = 20
# Shorter says nothing that could be looked for: `return 1`, `pass`.
MINIMUM_DOCSTRING_WORDS = 3
MINIMUM_SOURCE_CHARACTERS = 60
MAXIMUM_NEGATIVES = 8
# Conversations are kept short: what is longer is cut in a prompt.
MAXIMUM_PROMPT_LINES = 40
MAXIMUM_CANDIDATES = 4
# One function in so many has a conversation of two turns.
TWO_TURNS_IN = 3

# Tests, and demonstrations whose docstrings are screens of text.
SKIPPED = frozenset({'test', 'tests', 'idle_test', 'turtledemo'})

# Phrasings: which one a function gets is decided by the hash of its name.
FIND = (
  'Find the Python function that this docstring describes',
  'Given a docstring, retrieve the source of the function it belongs to',
  'Retrieve the Python code that does what is described',
  'Which function of the standard library does this',
)
DESCRIBE = (
  'Write the docstring of this Python function:',
  'What does this function do? Answer with its docstring.',
  'Document this Python function in a sentence or two:',
)
CHOOSE = (
  'Which of the functions below does the following?',
  'Name the function below that this docstring belongs to.',
  'One of these functions is described here. Answer with its name.',
)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Function:
  """A function or method of the library.

  Attributes:
    module: dotted name of its module.
    name: qualified name in the module, as `Condition.wait`.
    signature: qualified name with its parameters.
    docstring: its docstring's first paragraph, in one line.
    source: its source, dedented, without the docstring.
  """

  module: str
  name: str
  signature: str
  docstring: str
  source: str


def library_files(root: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
  """Yields the dotted name and file of each module, the same in each run.

  Args:
    root: folder of the standard library. Packages installed into it are not of
      the library, and their folders are not entered.
  """
  for name in sorted(sys.stdlib_module_names):
    for path in (root / f'{name}.py', *sorted((root / name).rglob('*.py'))):
      parts = path.relative_to(root).with_suffix('').parts
      if path.is_file() and SKIPPED.isdisjoint(parts):
        yield '.'.join(parts).removesuffix('.__init__'), path


def parse_functions(module: str, text: str) -> Iterator[Function]:
  """Yields a module's functions that have a docstring, in its order."""
  with warnings.catch_warnings():
    # The library's own invalid escapes are not the user's concern.
    warnings.simplefilter('ignore')
    tree = ast.parse(text)
  # The positions that ast gives count the bytes of UTF-8.
  lines = text.encode().split(b'\n')
  for name, node in function_nodes(tree):
    docstring = first_paragraph(ast.get_docstring(node) or '')
    if docstring:
      yield Function(
        module=module,
        name=name,
        signature=f'{name}({ast.unparse(node.args)})',
        docstring=docstring,
        source=source_without_docstring(lines, node),
      )


def function_nodes(
  node: ast.AST, prefix: str = ''
) -> Iterator[tuple[str, FunctionNode]]:
  """Yields functions and methods with their qualified names.

  A function inside a function is left out: its docstring would find the outer
  one, which holds it, as well.
  """
  for child in ast.iter_child_nodes(node):
    if isinstance(child, FunctionNode):
      yield prefix + child.name, child
    elif isinstance(child, ast.ClassDef):
      yield from function_nodes(child, f'{prefix}{child.name}.')
    elif not isinstance(child, ast.expr):
      yield from function_nodes(child, prefix)


def first_paragraph(docstring: str) -> str:
  """Returns the first paragraph in one line, '' if it says too little."""
  words = re.split(r'\n\s*\n', docstring.strip(), maxsplit=1)[0].split()
  # An example at the prompt shows the function instead of describing it.
  if len(words) < MINIMUM_DOCSTRING_WORDS or words[0] == '>>>':
    return ''
  return ' '.join(words)


def source_without_docstring(lines: Sequence[bytes], node: FunctionNode) -> str:
  """Returns a function's source: decorators, comments, no docstring.

  Args:
    lines: the module's text in UTF-8.
    node: the function, as parsed from that text. It has a docstring.
  """
  first = min(part.lineno for part in (node, *node.decorator_list)) - 1
  kept = list(lines[first : node.end_lineno])
  docstring = node.body[0]
  top = docstring.lineno - 1 - first
  # A node that was parsed has a last line.
  bottom = docstring.end_lineno - first  # type: ignore[operator]
  before = kept[top][: docstring.col_offset]
  after = kept[bottom - 1][docstring.end_col_offset :].lstrip(b' ;')
  if len(node.body) == 1:
    after = b'pass  ' + after
  line = (before + after).rstrip()
  while bottom < len(kept) and not kept[bottom].strip():
    bottom += 1
  kept[top:bottom] = [line] if line else []
  # Not textwrap.dedent: a text in the body that hangs out to the left would
  # keep it from dedenting at all.
  indent = kept[0][: len(kept[0]) - len(kept[0].lstrip())]
  return '\n'.join(line.removeprefix(indent).decode() for line in kept)


def in_test(name: str) -> bool:
  """Returns whether what has this name is held out, on every machine."""
  return zlib.crc32(name.encode()) % 100 < TEST_PERCENT


def split_functions(
  functions: Iterable[Function], is_held_out: Callable[[Function], bool]
) -> dict[str, list[Function]]:
  """Returns the functions to use by split, in order, without duplicates.

  Args:
    functions: of all splits.
    is_held_out: whether a function is in test.
  """
  splits: dict[str, list[Function]] = {'train': [], 'test': []}
  seen: set[tuple[str, ...]] = set()
  # Test first, so that of what is in both it is train that goes without.
  for one in sorted(functions, key=lambda one: not is_held_out(one)):
    source = ' '.join(one.source.split())
    keys = {
      ('name', one.module, one.name),
      ('source', source),
      ('docstring', one.docstring.casefold().rstrip('.')),
    }
    if (
      len(source) >= MINIMUM_SOURCE_CHARACTERS
      and one.docstring not in source
      and seen.isdisjoint(keys)
    ):
      splits['test' if is_held_out(one) else 'train'].append(one)
      seen |= keys
  return splits


@functools.cache
def read_library() -> dict[str, list[Function]]:
  """Returns the functions of the running Python's library, by split."""
  functions: list[Function] = []
  unreadable = 0
  for module, path in library_files(pathlib.Path(sysconfig.get_path('stdlib'))):
    try:
      with tokenize.open(path) as file:
        functions += parse_functions(module, file.read())
    except (SyntaxError, ValueError):  # Does not parse, or does not decode.
      unreadable += 1
  splits = split_functions(functions, lambda one: in_test(one.module))
  logging.info(
    'Standard library: %d functions in train, %d in test; %d files could not '
    'be read.',
    len(splits['train']),
    len(splits['test']),
    unreadable,
  )
  return splits


def with_neighbours(
  functions: Sequence[Function],
) -> Iterator[tuple[Function, list[Function]]]:
  """Yields each function of a split with its neighbours, nearest first.

  They are of the same module. Only where it has no other function they are of
  the same package, and then of any, in the order of a hash.
  """
  modules: dict[str, list[Function]] = {}
  for one in functions:
    modules.setdefault(one.module, []).append(one)
  for one in functions:
    members = modules[one.module]
    if len(members) > 1:
      place = members.index(one)
      order = sorted(range(len(members)), key=lambda other: abs(other - place))
      others = [members[other] for other in order[1:]]
    else:
      package = one.module.partition('.')[0]
      others = sorted(
        (other for other in functions if other is not one),
        key=lambda other: (
          other.module.partition('.')[0] != package,
          crc32(one.module, other.module, other.name),
        ),
      )
    yield one, others[:MAXIMUM_NEGATIVES]


def crc32(*texts: str) -> int:
  """Returns a hash that is the same in every run, unlike Python's own."""
  return zlib.crc32('\n'.join(texts).encode())


def pick(phrasings: Sequence[str], function: Function) -> str:
  """Returns the phrasing that a function gets, the same in every run."""
  return phrasings[crc32(function.module, function.name) % len(phrasings)]


def embedding_records(functions: Sequence[Function]) -> Iterator[dict]:
  """Yields a record for each function of a split."""
  for one, neighbours in with_neighbours(functions):
    # What is looked for has no instruction.
    yield {
      'query': [pick(FIND, one), one.docstring],
      'pos': [['', one.source]],
      'neg': [['', other.source] for other in neighbours],
    }


def generative_records(functions: Sequence[Function]) -> Iterator[dict]:
  """Yields the conversations about each function of a split."""
  for one, neighbours in with_neighbours(functions):
    text = describe(one)
    if crc32('turns', one.module, one.name) % TWO_TURNS_IN == 0:
      text += choose(neighbours[0], [one, *neighbours[1:]])
    yield {'text': text}
    yield {'text': choose(one, neighbours)}


def describe(function: Function) -> list[str]:
  """Returns the turns that ask for a docstring and give it."""
  lines = function.source.split('\n')
  if len(lines) > MAXIMUM_PROMPT_LINES:
    lines = [*lines[:MAXIMUM_PROMPT_LINES], '...']
  prompt = '\n'.join([pick(DESCRIBE, function), '', *lines])
  return [prompt, function.docstring]


def choose(function: Function, others: Sequence[Function]) -> list[str]:
  """Returns the turns that ask which function does something and name it."""
  # Another module's function may have the same name: no answer if both stand.
  others = [other for other in others if other.name != function.name]
  candidates = [function, *others[: MAXIMUM_CANDIDATES - 1]]
  candidates.sort(key=lambda one: crc32(function.name, one.module, one.name))
  signatures = [one.signature for one in candidates]
  prompt = [pick(CHOOSE, function), '', function.docstring, '', *signatures]
  return ['\n'.join(prompt), function.name]


class StandardLibrary(tfds.core.GeneratorBasedBuilder):
  """The running Python's standard library, to embed and to converse about."""

  # 1 is this file's: raise it when records change. The rest is the Python's:
  # each has a library of its own, and TFDS keeps a folder for each version.
  VERSION = tfds.core.Version(
    f'1.{sys.version_info.minor}.{sys.version_info.micro}'
  )
  # Nothing is downloaded, so there are no checksums. Left to itself TFDS 4.9.10
  # looks for them by way of importlib_resources, which it does not install.
  url_infos = None
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(
      name='embedding', description='Docstrings find sources.'
    ),
    tfds.core.BuilderConfig(
      name='generative', description='Conversations about functions.'
    ),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict({'json': tfds.features.Text()}),
      homepage='https://docs.python.org/3/library/',
      license='Python Software Foundation License Version 2',
      # The order is the library's: the same bytes in every run.
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
    del dl_manager  # Nothing is downloaded.
    # A bar would last a second. TFDS has one switch, for the whole process.
    tfds.disable_progress_bar()
    return {
      split: self._generate_examples(functions)
      for split, functions in read_library().items()
    }

  def _generate_examples(
    self, functions: Sequence[Function]
  ) -> Iterator[tuple[int, dict[str, str]]]:
    make_records = {
      'embedding': embedding_records,
      'generative': generative_records,
    }[self.builder_config.name]
    for key, record in enumerate(make_records(functions)):
      yield key, {'json': json.dumps(record, ensure_ascii=False)}
