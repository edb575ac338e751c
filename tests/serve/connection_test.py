"""Tests of what ends a connection."""

import concurrent.futures
import contextlib
import http.client
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip('openai')
pytest.importorskip('starlette')
pytest.importorskip('uvicorn')

from running_server import (  # noqa: E402
  KEY,
  MODEL,
  NAME,
  PATIENCE,
  Running,
  run,
  wait_until,
)

from grit_jax import GritLM  # noqa: E402
from grit_jax.config import Config  # noqa: E402
from grit_jax.serve import connection  # noqa: E402
from grit_jax.serve.connection import Connection  # noqa: E402

HEAD = 'POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\n'
CHUNKED = f'{HEAD}Transfer-Encoding: chunked\r\n\r\n'
MAX_CONNECTIONS = 8


@pytest.fixture(scope='module')
def running(
  tmp_path_factory: pytest.TempPathFactory, write_run: Callable
) -> Iterator[Running]:
  path = tmp_path_factory.mktemp('serve') / 'checkpoint'
  write_run(path, Config(model=MODEL))
  model = GritLM.load(path)
  with run(model, max_connections=MAX_CONNECTIONS) as found:
    yield found


@pytest.fixture
def short_deadlines(monkeypatch: pytest.MonkeyPatch):
  for name in ('HEAD_SECONDS', 'BODY_SECONDS', 'READ_SECONDS'):
    monkeypatch.setattr(connection, name, 1)


def connect(running: Running) -> socket.socket:
  return socket.create_connection(('127.0.0.1', running.port), PATIENCE)


def wait_until_closed(
  client: socket.socket, repeated: bytes = b''
) -> tuple[bytes, float]:
  """Returns what came until the server closed, and after how many seconds."""
  start, found = time.monotonic(), b''
  client.settimeout(0.1)
  while time.monotonic() - start < PATIENCE:
    with contextlib.suppress(TimeoutError):
      try:
        client.sendall(repeated)
        if not (part := client.recv(2**16)):
          break
        found += part
      except (BrokenPipeError, ConnectionResetError):
        break
  return found, time.monotonic() - start


# What a client sends once, then again and again, and what comes of it.
UNFINISHED = [
  ('', b'', [408]),
  ('POST /v1/emb', b'e', [408]),
  (HEAD.format(KEY), b'a', [408]),
  (HEAD.format(KEY), b'a: b\r\n', [408]),
  (f'{HEAD}Content-Length: 99\r\n\r\n'.format(KEY), b'', [408]),
  (CHUNKED.format(KEY), b'', [408]),
  (CHUNKED.format(KEY), b'1\r\na\r\n', [408]),
  # After an answer.
  ('GET /health HTTP/1.1\r\nHost: a\r\n\r\n', b'G', [200, 408]),
  (f'{HEAD}Content-Length: 99\r\n\r\n'.format('no'), b'', [401]),
  (CHUNKED.format('no'), b'1\r\na\r\n', [401]),
  (f'{HEAD}Expect: 100-continue\r\n\r\n'.format('no'), b'a', [401, 408]),
  ('CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n', b'a', [404, 408]),
  (
    f'{HEAD}Upgrade: b\r\nConnection: upgrade\r\n\r\n'.format('no'),
    b'a', [401, 408],
  ),
  # Not HTTP.
  ('\x00\x01\x02' * 99, b'\x03', [400]),
  ('', b'\r\n', [400]),
  (CHUNKED.format(KEY) + 'no chunk\r\n', b'', [400]),
]  # fmt: skip


def test_clients_that_send_no_whole_request_are_not_waited_for(
  running: Running, short_deadlines: None, caplog: pytest.LogCaptureFixture
):
  def send(sent: str, repeated: bytes) -> tuple[list[int], float]:
    with connect(running) as client:
      client.sendall(sent.encode())
      found, seconds = wait_until_closed(client, repeated)
    return [int(x) for x in re.findall(rb'HTTP/1.1 (\d+)', found)], seconds

  # Side by side: most of them only wait.
  with (
    caplog.at_level(logging.INFO),
    concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS - 1) as pool,
  ):
    sent, repeated, expected = zip(*UNFINISHED, strict=True)
    found = list(pool.map(send, sent, repeated))
    wait_until(lambda: not running.server.server_state.connections)
  for (statuses, seconds), wanted, text in zip(
    found, expected, sent, strict=True
  ):
    assert statuses == wanted and seconds < 4, text
  assert len(caplog.records) <= len(UNFINISHED)
  assert running.ask('/health', method='GET')[0] == 200


def test_what_is_not_http_after_an_answer_is_no_fault_of_ours(
  running: Running, caplog: pytest.LogCaptureFixture
):
  with connect(running) as client:
    client.sendall(CHUNKED.format('no').encode())
    assert client.recv(2**16).startswith(b'HTTP/1.1 401')
    client.sendall(b'no chunk\r\n')
    wait_until_closed(client)
  assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize(
  'path, body',
  [
    ('embeddings', {'input': ['a'] * 1500}),
    (
      'chat/completions',
      {'messages': [{'role': 'user', 'content': 'a'}], 'stream': True},
    ),
  ],
)
def test_a_client_that_reads_nothing_is_not_waited_for(
  running: Running,
  monkeypatch: pytest.MonkeyPatch,
  short_deadlines: None,
  path: str,
  body: dict,
):
  # It stands in every piece of an answer.
  name = 'n' * 8000
  monkeypatch.setattr(running.service, '_name', name)
  content = json.dumps({'model': name, **body})
  head = HEAD.format(KEY).replace('embeddings', path)
  [listener] = running.server.servers[0].sockets
  # Connections have what the socket has that they come from.
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)
  with socket.socket() as client:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    client.connect(('127.0.0.1', running.port))
    client.sendall(f'{head}Content-Length: {len(content)}\r\n\r\n'.encode())
    client.sendall(content.encode())
    [served] = wait_for_connections(running, 1)
    wait_until(lambda: served.transport.get_write_buffer_size())
    wait_for_connections(running, 0)


def wait_for_connections(running: Running, count: int) -> list[Connection]:
  connections = running.server.server_state.connections
  wait_until(lambda: len(connections) == count)
  return list(connections)


def test_a_slow_answer_and_a_busy_connection_are_waited_for(
  running: Running, monkeypatch: pytest.MonkeyPatch, short_deadlines: None
):
  encode = GritLM.encode

  def encode_slowly(self: GritLM, *arguments, **more):
    time.sleep(3)
    return encode(self, *arguments, **more)

  with monkeypatch.context() as patch:
    patch.setattr(GritLM, 'encode', encode_slowly)
    body = {'model': NAME, 'input': 'a'}
    assert running.ask('/v1/embeddings', body)[0] == 200
  client = http.client.HTTPConnection('127.0.0.1', running.port)
  with contextlib.closing(client):
    for _ in range(30):
      client.request('GET', '/health')
      assert client.getresponse().read() == b'{"status": "ok"}'
      time.sleep(0.1)


def test_connections_are_limited_and_those_over_it_counted(
  running: Running, caplog: pytest.LogCaptureFixture
):
  Connection.ended.clear()
  with contextlib.ExitStack() as stack:
    silent = [
      stack.enter_context(connect(running)) for _ in range(MAX_CONNECTIONS)
    ]
    wait_for_connections(running, MAX_CONNECTIONS)
    for _ in range(20):
      with connect(running) as client:
        found, _ = wait_until_closed(client)
        assert found.startswith(b'HTTP/1.1 503 Service Unavailable')
        assert b'too many connections' in found
    silent.pop().close()
    wait_for_connections(running, MAX_CONNECTIONS - 1)
    assert running.ask('/health', method='GET')[0] == 200
  with caplog.at_level(logging.INFO):
    Connection.report()
    Connection.report()
  [record] = caplog.records
  assert '20 as too many connections' in record.getMessage()
