"""Every flag of every command, at and beyond the ends of its range."""

import argparse
import importlib
from collections.abc import Iterator

import pytest

from grit_jax import cli
from grit_jax.errors import ConfigError

# Of the extra `serve`, whose command says so without it.
pytest.importorskip('uvicorn')

COMMANDS = (
  'train', 'encode', 'aot.__main__', 'convert.__main__', 'data.prepare',
  'evaluate.__main__', 'rag.__main__', 'serve.__main__',
)  # fmt: skip

# Of which an empty one means something: nothing is asked for.
MAY_BE_EMPTY = {
  '--answer_start', '--base', '--instruction', '--languages', '--name',
  'rag ask --model', 'rag benchmark --model',
}  # fmt: skip
NUMBERS = ('', 'x', '0x1', '1e999', 'nan', '-inf', '9' * 40, '-' + '9' * 40)


def flags() -> Iterator[tuple[str, argparse.ArgumentParser, argparse.Action]]:
  """Yields all flags, with their commands and what parses them."""

  def walk(command: str, parser: argparse.ArgumentParser) -> Iterator:
    for action in parser._actions:
      if isinstance(action, argparse._SubParsersAction):
        for name, inner in action.choices.items():
          yield from walk(f'{command} {name}', inner)
      elif action.option_strings and action.nargs != 0:
        yield command, parser, action

  for name in COMMANDS:
    module = importlib.import_module(f'grit_jax.{name}')
    command = name.removesuffix('.__main__').removeprefix('data.')
    yield from walk(command, module.make_parser())


FLAGS = {
  f'{command} {action.option_strings[0]}': (parser, action)
  for command, parser, action in flags()
}


def beyond(action: argparse.Action) -> list[str]:
  """Returns what a flag must refuse."""
  if action.choices:
    return ['nonsense', ' ']
  bounds = getattr(action.type, 'bounds', None)
  if bounds is not None:
    step = 1 if bounds.least == int(bounds.least) else 0.1
    return [*NUMBERS, str(bounds.least - step), str(bounds.most * 2 + 1)]
  if action.type is cli.parse_given:
    return ['', ' ', '\t']
  return ['nonsense', '']


@pytest.mark.parametrize('name', FLAGS)
def test_what_is_beyond_its_range_is_refused_by_name(name):
  parser, action = FLAGS[name]
  flag = action.option_strings[0]
  if action.type is None and action.choices is None:
    assert {flag, name} & MAY_BE_EMPTY, f'{name} takes anything'
    return
  for value in beyond(action):
    with pytest.raises(ConfigError, match=flag):
      parser.parse_args([f'{flag}={value}'])


@pytest.mark.parametrize('name', FLAGS)
def test_the_ends_of_its_range_are_taken(name):
  parser, action = FLAGS[name]
  bounds = getattr(action.type, 'bounds', None)
  if bounds is None:
    return
  for end in bounds.least, bounds.most:
    if bounds.has(end):
      assert parser._get_value(action, f'{end:.0f}') == end
