"""An object store on this machine, as TensorStore's gcs driver speaks to one.

Of Cloud Storage's JSON API it has what objects of a few bytes need: reads,
writes and deletions, each on a condition on the object's generation, answered
one at a time.
"""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator


class ObjectStore:
  """Objects with their generations; 0 is the generation of none."""

  def __init__(self) -> None:
    """Begins empty, and reachable."""
    self.objects: dict[str, tuple[int, bytes]] = {}
    self.is_reachable = True
    # Called before an object is written.
    self.before_write: Callable[[], None] = lambda: None
    self.lock = threading.Lock()
    self._generation = 0

  def change(
    self, name: str, content: bytes | None, condition: str | None
  ) -> int | None:
    """Writes or deletes; returns the new generation, None if it is barred."""
    current = self.objects.get(name, (0, b''))[0]
    if condition is not None and int(condition) != current:
      return None
    if content is None:
      self.objects.pop(name, None)
      return 0
    self._generation += 1
    self.objects[name] = self._generation, content
    return self._generation


@contextlib.contextmanager
def serve() -> Iterator[tuple[ObjectStore, str]]:
  """Yields a store and its address."""
  store = ObjectStore()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_: object) -> None:
      pass

    def handle_one(self) -> None:
      url = urllib.parse.urlsplit(self.path)
      query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
      body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
      condition = query.get('ifGenerationMatch')
      with store.lock:
        if not store.is_reachable:
          self.answer(404 if self.command == 'GET' else 400, b'')
          return
        if self.command == 'POST':
          store.before_write()
          generation = store.change(query['name'], body, condition)
          metadata = {'name': query['name'], 'generation': str(generation)}
          content = json.dumps({'size': str(len(body)), **metadata}).encode()
          self.answer(412 if generation is None else 200, content)
          return
        name = urllib.parse.unquote(url.path.rpartition('/o/')[2])
        found = store.objects.get(name)
        if found is None:
          self.answer(404, b'')
        elif self.command == 'DELETE':
          barred = store.change(name, None, condition) is None
          self.answer(412 if barred else 204, b'')
        else:
          self.answer(200, found[1], found[0])

    do_GET = do_POST = do_DELETE = handle_one

    def answer(self, status: int, body: bytes, generation: int = 0) -> None:
      self.send_response(status)
      if generation:
        self.send_header('x-goog-generation', str(generation))
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      self.wfile.write(body)

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield store, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
