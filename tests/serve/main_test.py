"""Tests of the command, in a process of its own."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip('starlette')
pytest.importorskip('uvicorn')

from grit_jax.config import Config  # noqa: E402
from grit_jax.errors import ConfigError, UserError
from grit_jax.models import presets  # noqa: E402
from grit_jax.serve.__main__ import (  # noqa: E402
  _LIMITS,
  BACKLOG,
  KEY_VARIABLE,
  MAX_KEY_LENGTH,
  OWN_FILES,
  count_connections,
  find_key,
  make_parser,
  serve,
)

MODEL = dataclasses.replace(
  presets.tiny(), vocab_size=407, num_layers=1, max_positions=128
)
# Seconds for a process that imports JAX and compiles, on a busy machine.
PATIENCE = 300


@pytest.fixture(scope='module')
def workdir(
  tmp_path_factory: pytest.TempPathFactory, write_run: Callable
) -> pathlib.Path:
  path = tmp_path_factory.mktemp('serve') / 'a_model'
  write_run(path, Config(model=MODEL))
  return path


def start(*flags: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-m', 'grit_jax.serve', *flags],
    stderr=subprocess.PIPE,
    text=True,
  )


def read_address(lines: Iterator[str]) -> str:
  """Returns the address that the log has, once the server listens."""
  for line in lines:
    if found := re.search(r'Serving at (\S+)/v1', line):
      return found[1]
  raise AssertionError('the server has ended')


def test_it_serves_until_a_signal_and_ends_what_runs(workdir: pathlib.Path):
  process = start(f'--model={workdir}', '--port=0', '--api_key=secret')
  try:
    address = read_address(process.stderr)
    body = {
      'model': 'a_model', 'messages': [{'role': 'user', 'content': 'Why?'}],
      'stream': True,
    }  # fmt: skip
    request = urllib.request.Request(
      f'{address}/v1/chat/completions',
      json.dumps(body).encode(),
      {'Authorization': 'Bearer secret'},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as stream:
      assert b'assistant' in stream.readline()
      process.send_signal(signal.SIGTERM)
      assert stream.read().endswith(b'data: [DONE]\n\n')
    log = process.stderr.read()
    # As of a process that a signal has ended.
    assert process.wait(PATIENCE) == -signal.SIGTERM
  finally:
    process.kill()
    process.stderr.close()
  assert log.count('POST /v1/chat/completions: 200') == 1
  assert 'Traceback' not in log
  with pytest.raises(urllib.error.URLError):
    urllib.request.urlopen(f'{address}/health')


@pytest.mark.parametrize(
  'flag, reason',
  [
    ('--host=', 'argument --host: it is empty'),
    ('--api_key=', 'argument --api_key: it is empty'),
    ('--mesh=rows=2', 'rows'),
    ('--dtype=float16', "'float32', 'bfloat16'"),
    ('--quantization=int4', 'int8'),
  ],
)
def test_a_flag_that_cannot_be_is_refused(flag: str, reason: str):
  with pytest.raises(ConfigError, match=reason):
    make_parser().parse_args(['--model=m', flag])


def test_an_address_is_taken_before_the_model_loads():
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    flags = ['--model=no_model', f'--port={port}']
    with pytest.raises(ConfigError, match=f'--port={port}: .*in use'):
      serve(make_parser().parse_args(flags))
  # With the address free it comes to the model, and leaves the address free.
  for _ in range(2):
    with pytest.raises(UserError, match='no_model'):
      serve(make_parser().parse_args(flags))


@pytest.mark.parametrize(
  'host', ['ü' * 300, 'a\udcff', 'a\0b', '.', 'a' * 300, '::::', '192.0.2.1']
)
def test_a_host_that_cannot_be_is_named(host: str):
  flags = make_parser().parse_args(
    ['--model=no_model', '--port=0', f'--host={host}']
  )
  with pytest.raises(
    ConfigError, match=f'--host={re.escape(host)} --port=0: .'
  ):
    serve(flags)


@pytest.mark.parametrize('name', [*_LIMITS, 'stop_seconds', 'port'])
def test_a_number_is_refused_beyond_its_range(name: str):
  low, high = (0, 2**16 - 1) if name == 'port' else (1, 2**31 - 1)
  for text in (str(low - 1), str(high + 1), '9' * 5000, '1e3', '', ' ', 'x'):
    with pytest.raises(ConfigError, match=f'--{name}'):
      make_parser().parse_args(['--model=m', f'--{name}={text}'])
  for number in (low, high):
    flags = make_parser().parse_args(['--model=m', f'--{name}={number}'])
    assert getattr(flags, name) == number


@pytest.fixture
def give_key(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, bytes], list[str]]:
  """Gives a key in the environment, or returns the flag that does."""

  def give(source: str, key: bytes) -> list[str]:
    if source == KEY_VARIABLE:
      monkeypatch.setenv(source, os.fsdecode(key))
      return []
    if source == '--api_key_file':
      (tmp_path / 'key').write_bytes(key)
      return [f'--api_key_file={tmp_path}/key']
    return [f'--api_key={os.fsdecode(key)}']

  monkeypatch.delenv(KEY_VARIABLE, raising=False)
  return give


SOURCES = ['--api_key', '--api_key_file', KEY_VARIABLE]


def read_key(*flags: str) -> str:
  return find_key(make_parser().parse_args(['--model=m', *flags]))


@pytest.mark.parametrize('source', SOURCES)
def test_a_key_is_given_as_a_flag_in_a_file_or_in_the_environment(
  give_key: Callable, source: str
):
  for key in (b'secret', b'a key', b'k' * MAX_KEY_LENGTH):
    assert read_key(*give_key(source, key)) == key.decode()


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize(
  'key',
  [
    b'', b' ', b' a', b'a ', b'a\n\n', b'a\tb', b'a\nb', 'schlüssel'.encode(),
    b'\xff', b'a\x7f', b'k' * (MAX_KEY_LENGTH + 1),
  ],
)  # fmt: skip
def test_a_key_that_no_client_can_send_is_refused(
  give_key: Callable, source: str, key: bytes
):
  with pytest.raises(ConfigError, match=source) as caught:
    read_key(*give_key(source, key))
  assert len(str(caught.value)) < 300


def test_a_key_is_given_once(give_key: Callable):
  assert read_key() == ''
  for first, second in itertools.combinations(SOURCES, 2):
    flags = [*give_key(first, b'a'), *give_key(second, b'a')]
    with pytest.raises(ConfigError, match=f'{first} and {second}'):
      read_key(*flags)
    os.environ.pop(KEY_VARIABLE, None)


def test_the_file_of_a_key_is_read_as_editors_write_it(
  tmp_path: pathlib.Path, give_key: Callable
):
  for end in (b'\n', b'\r\n'):
    assert read_key(*give_key('--api_key_file', b'secret' + end)) == 'secret'
  with pytest.raises(FileNotFoundError, match='no_key'):
    read_key(f'--api_key_file={tmp_path}/no_key')


def test_caches_that_do_not_fit_are_refused_before_they_are_made(
  workdir: pathlib.Path,
):
  flags = [f'--model={workdir}', '--port=0', f'--max_batch={2**31 - 1}']
  with pytest.raises(
    ConfigError, match='GB at most, and there are .*max_batch'
  ):
    serve(make_parser().parse_args(flags))


def test_connections_are_no_more_than_files_may_be_open(
  caplog: pytest.LogCaptureFixture,
):
  own = BACKLOG + OWN_FILES
  found = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (own + 9, found[1]))
    assert count_connections(9) == 9 and not caplog.records
    assert count_connections(10) == 9
    assert '9 connections, not --max_connections=10' in caplog.text
    resource.setrlimit(resource.RLIMIT_NOFILE, (own, found[1]))
    with pytest.raises(UserError, match=f'{own} files .*too few'):
      count_connections(1)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, found)
