"""What a path may not be, in every flag of a path, is one message with it."""

import importlib
import os
import pathlib

import pytest

from grit_jax.cli import describe_os_error
from grit_jax.convert.from_hf import from_hf
from grit_jax.errors import UserError

COMMANDS = {
  'convert.__main__:convert': [
    'from_hf --source={path} --target={new}',
    'from_hf --source={model} --target={path}',
    'to_hf --source={path} --target={new}',
    'to_hf --source={run} --target={path}',
    'to_peft --source={path} --target={new}',
  ],
  'encode:encode': [
    '--model={path} --input={corpus} --output={new}',
    '--model={model} --input={path} --output={new}',
    '--model={model} --input={corpus} --output={path}',
  ],
  'rag.__main__:answer': [
    'index --model={path} --source={documents} --index={new}',
    'index --model={model} --source={path} --index={new}',
    'index --model={model} --source={documents} --index={path}',
    'ask Who? --index={path}',
    'benchmark --output={new} --model={path}',
    'benchmark --output={path} --model={model}',
  ],
  'data.prepare:run': [
    '--source={path} --tokenizer={model} --target={new}',
    '--source={corpus} --tokenizer={path} --target={new}',
    '--source={corpus} --tokenizer={model} --target={path}',
  ],
}
PLACES = {
  'http': 'http://host/model',
  's3': 's3://bucket/model',
  'not UTF-8': os.fsdecode(b'caf\xe9/model'),
  'too long': 'a' * 300 + '/model',
  'below a file': 'file/model',
}


@pytest.fixture(scope='module')
def given(tmp_path_factory, write_hf):
  folder = tmp_path_factory.mktemp('given')
  write_hf(folder / 'model')
  from_hf(folder / 'model', folder / 'run')
  (folder / 'corpus.jsonl').write_text('{"text": ["a", "b"]}\n')
  (folder / 'documents.txt').write_text('A text.')
  (folder / 'file').write_text('A file.')
  return folder


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize(
  ('command', 'flags'),
  [(name, flags) for name, all_of in COMMANDS.items() for flags in all_of],
)
def test_a_place_that_cannot_be_is_one_message(
  given, tmp_path, monkeypatch, command, flags, place
):
  monkeypatch.chdir(given)
  module, _, function = command.partition(':')
  module = importlib.import_module(f'grit_jax.{module}')
  names = {
    'path': PLACES[place], 'model': 'model', 'run': 'run',
    'corpus': 'corpus.jsonl', 'documents': 'documents.txt',
    'new': str(tmp_path / 'new'),
  }  # fmt: skip
  argv = [part.format(**names) for part in flags.split()]
  parsed = module.make_parser().parse_args(argv)
  before = sorted(given.iterdir())
  with pytest.raises((UserError, OSError)) as raised:
    if function == 'run':
      module.prepare(module.make_config(parsed), parsed.target)
    else:
      getattr(module, function)(parsed)
  error = raised.value
  message = (
    str(error) if isinstance(error, UserError) else describe_os_error(error)
  )
  # As a path, `//` is one slash.
  shown = PLACES[place].split('/')[0]
  assert shown in message or ascii(shown)[1:-1] in message, message
  assert sorted(given.iterdir()) == before
  assert not pathlib.Path(tmp_path / 'new' / 'index.json').exists()


@pytest.mark.parametrize('command', ['lm', 'mteb'])
@pytest.mark.parametrize('place', ['http', 'below a file'])
def test_where_figures_go_is_known_before_there_is_a_model(
  given, monkeypatch, command, place
):
  from grit_jax.evaluate import __main__ as evaluate

  monkeypatch.chdir(given)
  flags = ['--tasks=a', '--model=nowhere', f'--output={PLACES[place]}']
  with pytest.raises(UserError, match=f'^{PLACES[place]}'):
    evaluate.evaluate(evaluate.make_parser().parse_args([command, *flags]))
