"""Connections that end: deadlines for their clients, and a limit of all.

uvicorn closes connections that are idle between two requests, and no others.
"""

import collections
import http
import json
import math
import time
from asyncio import BaseTransport
from typing import Any, ClassVar

import h11
from absl import logging
from uvicorn.protocols.http.h11_impl import H11Protocol

from grit_jax.serve.requests import RequestError

# Seconds until the head of a request has come, from the connection's beginning
# or from the answer before; until its body has, from the end of its head; and
# until a client reads more of an answer.
HEAD_SECONDS = 15
BODY_SECONDS = 60
READ_SECONDS = 60


class Connection(H11Protocol):
  """uvicorn's connection, which ends if its client takes too long.

  Attributes:
    ended: how many ended, by the reason, since the last report.
  """

  ended: ClassVar[collections.Counter[str]] = collections.Counter()
  _progress: tuple[Any, ...] = ()
  _since = 0.0

  def connection_made(self, transport: BaseTransport) -> None:
    """See the base class."""
    super().connection_made(transport)
    if len(self.connections) >= (self.limit_concurrency or math.inf):
      self.connections.discard(self)
      self._end(503, 'too many connections are open; try again later')

  def send_400_response(self, msg: str) -> None:
    """Ends what is not HTTP; the base class cannot after an answer's begin."""
    self._end(400, 'what came was not HTTP')

  def check(self) -> None:
    """Ends the connection if its client takes too long; for once a second."""
    idle = self.cycle is None or self.cycle.response_complete
    state = self.conn.their_state
    unsent = self.transport.get_write_buffer_size()
    progress = (self.cycle, idle, state, unsent)
    if progress != self._progress:
      self._progress, self._since = progress, time.monotonic()
    waited = time.monotonic() - self._since
    if idle and waited > HEAD_SECONDS:
      self._end(408, f'no request had come after {HEAD_SECONDS} s')
    elif not idle and state is h11.SEND_BODY and waited > BODY_SECONDS:
      self._end(408, f'a body had not come after {BODY_SECONDS} s')
    elif unsent and waited > READ_SECONDS:
      self._end(408, f'nothing of an answer was read for {READ_SECONDS} s')

  def _end(self, status: int, reason: str) -> None:
    """Closes the connection, with an answer if none has begun."""
    self.ended[reason] += 1
    begun = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
    unsent = self.transport.get_write_buffer_size()
    if begun or unsent or self.transport.is_closing():
      self.transport.abort()
      return
    body = json.dumps(RequestError(status, f'{reason}.').body)
    self.transport.write(
      f'HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n'
      'Content-Type: application/json\r\nConnection: close\r\n'
      f'Content-Length: {len(body)}\r\n\r\n{body}'.encode()
    )
    self.transport.close()

  @classmethod
  def report(cls) -> None:
    """Logs what has ended since the last time: a line, however many."""
    if cls.ended:
      logging.warning(
        'Connections were closed: %s.',
        ', '.join(f'{count} as {why}' for why, count in cls.ended.items()),
      )
      cls.ended.clear()
