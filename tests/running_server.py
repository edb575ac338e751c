"""A server that runs in a thread, for the tests of what it answers."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai

from grit_jax import GritLM
from grit_jax.models import presets
from grit_jax.serve.__main__ import bind, make_server
from grit_jax.serve.app import Limits, Service

MODEL = dataclasses.replace(
  presets.tiny(),
  vocab_size=407,
  num_layers=1,
  rope_theta=100.0,
  max_positions=192,
)
NAME, KEY = 'tiny', 'secret'
LIMITS = Limits(
  max_batch=2,
  max_queue=20,
  max_body_bytes=20_000,
  max_input_tokens=150,
  max_new_tokens=150,
)
# Seconds after which what should have happened has not.
PATIENCE = 60


@dataclasses.dataclass
class Running:
  """A server that runs in a thread."""

  service: Service
  server: Any
  port: int

  def ask(
    self,
    path: str,
    body: Any = None,
    method: str = 'POST',
    key: str = KEY,
    **headers: str,
  ) -> tuple[int, dict[str, str], Any]:
    """Sends a request; bytes go as they are, and what else there is as JSON."""
    connection = http.client.HTTPConnection(
      '127.0.0.1', self.port, timeout=PATIENCE
    )
    with contextlib.closing(connection):
      if not (body is None or hasattr(body, '__next__')):
        body = body if isinstance(body, bytes) else json.dumps(body)
      connection.request(
        method, path, body, {'Authorization': f'Bearer {key}', **headers}
      )
      response = connection.getresponse()
      return response.status, dict(response.getheaders()), response.read()

  def client(self) -> openai.OpenAI:
    return openai.OpenAI(
      base_url=f'http://127.0.0.1:{self.port}/v1',
      api_key=KEY,
      max_retries=0,
      timeout=PATIENCE,
    )


@contextlib.contextmanager
def run(
  model: GritLM, stop_seconds: int = 10, max_connections: int = 100
) -> Iterator[Running]:
  taken = bind('127.0.0.1', 0)
  service = Service(model, NAME, LIMITS, KEY)
  server = make_server(service, max_connections, stop_seconds)
  thread = threading.Thread(target=server.run, args=([taken],))
  thread.start()
  try:
    wait_until(lambda: server.started)
    yield Running(service, server, taken.getsockname()[1])
  finally:
    server.should_exit = True
    thread.join(PATIENCE)
    taken.close()
    assert not thread.is_alive()


def wait_until(holds: Callable[[], bool]) -> None:
  end = time.monotonic() + PATIENCE
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.01)
