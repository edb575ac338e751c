"""Tests of the command, in a process of its own."""

import dataclasses
import json
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
  BACKLOG,
  OWN_FILES,
  count_connections,
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
    ('--max_batch=0', "'0' is not a number from 1 to"),
    ('--max_queue=x', "'x' is not a number from 1 to"),
    ('--port=65536', "'65536' is not a port"),
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
