"""The routes: requests in, OpenAI's objects out."""

import asyncio
import contextlib
import dataclasses
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio.to_thread
from absl import logging
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grit_jax.inference.generation import Completion, Prompt, count_places
from grit_jax.inference.gritlm import GritLM
from grit_jax.serve import responses
from grit_jax.serve.batching import Batcher, ChatJob, EmbeddingJob
from grit_jax.serve.requests import (
  MAX_REQUEST_TOKENS,
  TOKEN_CHARACTERS,
  ChatRequest,
  EmbeddingRequest,
  RequestError,
  parse_chat,
  parse_embeddings,
)

# What nginx logs of a client that went away before its answer.
CLIENT_GONE = 499
# Requests that are parsed and tokenised, or answers that are written, at one
# time: each takes memory, and Python runs one thread of them anyway.
THREADS = 4


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one request, or all together, may take; each 1 or more.

  Attributes:
    max_batch: Chats that are answered side by side.
    max_queue: Requests that wait to begin.
    max_connections: Open at one time, with a request or without.
    max_body_bytes: Of a request.
    max_input_tokens: Of a text with its instruction, and of a conversation.
    max_new_tokens: Of an answer.
  """

  max_batch: int = 16
  max_queue: int = 256
  max_connections: int = 512
  max_body_bytes: int = 4 * 2**20
  max_input_tokens: int = 2048
  max_new_tokens: int = 512


class Service:
  """A model behind its routes.

  Attributes:
    app: The ASGI application.
  """

  def __init__(self, model: GritLM, name: str, limits: Limits, api_key: str):
    """Starts the thread that runs the model.

    Args:
      model: The model, which nobody else uses meanwhile.
      name: What clients call it.
      limits: What it takes.
      api_key: What clients have to send; empty: nothing.
    """
    self._model, self._name, self._api_key = model, name, api_key
    architecture = model.config.model
    self._width = architecture.projection_dim or architecture.embed_dim
    self._positions = architecture.max_positions
    self._limits = dataclasses.replace(
      limits,
      max_input_tokens=min(limits.max_input_tokens, self._positions),
    )
    self._created = int(time.time())
    most = self._limits.max_input_tokens
    self._batcher = Batcher(
      model, limits.max_batch, limits.max_queue, most,
      count_places(architecture, most, limits.max_new_tokens),
    )  # fmt: skip
    self.app = Starlette(
      routes=[
        Route('/health', self._show_health),
        Route('/v1/models', self._list_models),
        Route('/v1/models/{name:path}', self._show_model),
        Route('/v1/embeddings', self._embed, methods=['POST']),
        Route('/v1/chat/completions', self._chat, methods=['POST']),
      ],
      middleware=[Middleware(_Log)],
      exception_handlers={
        RequestError: _explain,
        HTTPException: _explain_http,
        ClientDisconnect: _tell_nobody,
        Exception: _explain_failure,
      },
      lifespan=self._live,
    )

  @contextlib.asynccontextmanager
  async def _live(self, app: Starlette) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield
    await run_in_threadpool(self._batcher.close)

  async def _show_health(self, request: Request) -> Response:
    if not self._batcher.alive:
      raise RequestError(503, 'The thread that runs the model has ended.')
    return responses.respond({'status': 'ok'})

  async def _list_models(self, request: Request) -> Response:
    self._authorize(request)
    model = responses.describe_model(self._name, self._created)
    return responses.respond({'object': 'list', 'data': [model]})

  async def _show_model(self, request: Request) -> Response:
    self._authorize(request)
    if request.path_params['name'] != self._name:
      raise RequestError(
        404, f'There is no model but {self._name!r}.', 'model',
        'model_not_found',
      )  # fmt: skip
    return responses.respond(
      responses.describe_model(self._name, self._created)
    )

  async def _embed(self, request: Request) -> Response:
    body = await self._read(request)
    wanted, lengths = await run_in_threadpool(self._prepare_texts, body)
    job = EmbeddingJob(wanted.texts, wanted.instruction, lengths)
    found = await self._wait(request, job)
    if found is None:
      return Response(status_code=CLIENT_GONE)
    return await run_in_threadpool(
      lambda: responses.respond(
        responses.make_embeddings(
          self._name, found, wanted.base64, sum(lengths)
        )
      )
    )

  async def _chat(self, request: Request) -> Response:
    body = await self._read(request)
    wanted, prompt = await run_in_threadpool(self._prepare_prompt, body)
    head = {
      'id': f'chatcmpl-{secrets.token_hex(12)}',
      'created': int(time.time()),
      'model': self._name,
    }
    job = ChatJob(prompt, wanted.stream)
    if wanted.stream:
      self._batcher.submit(job)
      return _Events(
        _write_events(job, head, wanted.include_usage),
        lambda: self._batcher.drop(job),
      )
    completion = await self._wait(request, job)
    if completion is None:
      return Response(status_code=CLIENT_GONE)
    return responses.respond(responses.make_answer(head, completion))

  def _authorize(self, request: Request) -> None:
    given = request.headers.get('authorization', '')
    expected = f'Bearer {self._api_key}'
    if self._api_key and not hmac.compare_digest(
      given.encode(), expected.encode()
    ):
      raise RequestError(
        401,
        'The header `Authorization: Bearer KEY` is missing, or its key is not '
        'the one of this server.',
        code='invalid_api_key',
        headers={'WWW-Authenticate': 'Bearer'},
      )

  async def _read(self, request: Request) -> bytes:
    """Returns the body, of which no more is kept than may be."""
    self._authorize(request)
    limit = self._limits.max_body_bytes
    body = bytearray()
    declared = request.headers.get('content-length', '')
    large = declared.isdecimal() and int(declared) > limit
    if not large:
      async for part in request.stream():
        body += part
        if large := len(body) > limit:
          break
    if large:
      raise RequestError(413, f'The body is larger than {limit} bytes.')
    return bytes(body)

  def _prepare_texts(self, body: bytes) -> tuple[EmbeddingRequest, list[int]]:
    """Returns the texts, and the tokens of each."""
    wanted = parse_embeddings(body, self._name, self._width)
    limit = self._limits.max_input_tokens
    whole = max(MAX_REQUEST_TOKENS, limit)
    lengths: list[int] = []
    total = 0
    # One by one, up to the first that is too much: the instruction is tokenised
    # with each.
    for number, text in enumerate(wanted.texts):
      param = f'input[{number}]' if len(wanted.texts) > 1 else 'input'
      self._check_characters(param, len(wanted.instruction) + len(text))
      [length] = self._model.count_tokens([text], wanted.instruction)
      if not length:
        raise RequestError(400, f'{param}: the text is empty.', param)
      if length > limit:
        raise RequestError(
          400,
          f'{param}: the text has {length} tokens with its instruction, more '
          f'than the {limit} that are allowed.',
          param,
          'context_length_exceeded',
        )
      lengths.append(length)
      total += length
      if total > whole:
        raise RequestError(
          400,
          f'input: the first {len(lengths)} of {len(wanted.texts)} texts have '
          f'{total} tokens with their instruction, more than the {whole} that '
          'a request may have; send several requests.',
          'input',
        )
    return wanted, lengths

  def _prepare_prompt(self, body: bytes) -> tuple[ChatRequest, Prompt]:
    """Returns the conversation, and its tokens."""
    wanted = parse_chat(body, self._name, self._limits.max_new_tokens)
    # A message is a token or more even if it is empty.
    self._check_characters(
      'messages',
      sum(len(m['content']) + TOKEN_CHARACTERS for m in wanted.messages),
    )
    one = dataclasses.replace(wanted.sampling, max_new_tokens=1)
    try:
      prompt = self._model.encode_prompt(wanted.messages, one)
      limit = self._limits.max_input_tokens
      if prompt.length > limit:
        raise ValueError(
          f'The conversation has {prompt.length} tokens, more than the {limit} '
          'that are allowed.'
        )
    except ValueError as error:
      raise RequestError(
        400, f'messages: {error}', 'messages', 'context_length_exceeded'
      ) from error
    # An answer ends at the model's last position.
    new = min(wanted.sampling.max_new_tokens, self._positions - prompt.length)
    sampling = dataclasses.replace(wanted.sampling, max_new_tokens=new)
    return wanted, dataclasses.replace(prompt, sampling=sampling)

  def _check_characters(self, param: str, count: int) -> None:
    """Refuses what would be too long however it is tokenised."""
    limit = self._limits.max_input_tokens
    if count > TOKEN_CHARACTERS * limit:
      raise RequestError(
        400,
        f'{param}: {count} characters are more than the {limit} tokens that '
        f'are allowed, of {TOKEN_CHARACTERS} characters each.',
        param,
        'context_length_exceeded',
      )

  async def _wait(
    self, request: Request, job: EmbeddingJob | ChatJob
  ) -> Any | None:
    """Returns what the job gets, or None if the client goes away."""
    self._batcher.submit(job)
    answer = asyncio.ensure_future(job.get())
    gone = asyncio.ensure_future(_await_disconnect(request))
    try:
      await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
      return answer.result() if answer.done() else None
    finally:
      answer.cancel()
      gone.cancel()
      self._batcher.drop(job)


class _Events(StreamingResponse):
  """A stream of events; however it ends, `close` is called."""

  def __init__(self, events: AsyncIterator[str], close: Any):
    headers = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
    super().__init__(events, headers=headers, media_type='text/event-stream')
    self._close = close

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._close()


class _Log:
  """Logs a line a request, but of those that ask whether it runs."""

  def __init__(self, app: ASGIApp):
    self._app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http' or scope['path'] == '/health':
      await self._app(scope, receive, send)
      return
    start, status = time.monotonic(), 500

    async def watch(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      await self._app(scope, receive, watch)
    finally:
      logging.info(
        '%s %s: %d in %.3f s', scope['method'],
        ascii(scope['path'][:200])[1:-1], status, time.monotonic() - start,
      )  # fmt: skip


async def _write_events(
  job: ChatJob, head: Mapping[str, Any], include_usage: bool
) -> AsyncIterator[str]:
  """Yields an answer in pieces, as they come."""
  usage = {'usage': None} if include_usage else {}

  def write(delta: dict[str, str], finish_reason: str | None = None) -> str:
    return responses.make_event(
      responses.make_chunk(head, delta, finish_reason, **usage)
    )

  yield write({'role': 'assistant', 'content': ''})
  try:
    while not isinstance(event := await job.get(), Completion):
      yield write({'content': event})
  except RequestError as error:
    yield responses.make_event(error.body)
    return
  yield write({}, event.finish_reason)
  if include_usage:
    yield responses.make_event(
      responses.make_chunk(head, None, usage=responses.count_tokens(event))
    )
  yield 'data: [DONE]\n\n'


async def _await_disconnect(request: Request) -> None:
  while (await request.receive())['type'] != 'http.disconnect':
    pass


async def _explain(request: Request, error: RequestError) -> Response:
  return responses.respond(error.body, error.status, error.headers)


async def _explain_http(request: Request, error: HTTPException) -> Response:
  found = RequestError(
    error.status_code,
    f'{request.method} {request.url.path}: {error.detail}.',
    headers=error.headers,
  )
  return await _explain(request, found)


async def _tell_nobody(request: Request, error: ClientDisconnect) -> Response:
  return Response(status_code=CLIENT_GONE)


async def _explain_failure(request: Request, error: Exception) -> Response:
  found = RequestError(500, f'{type(error).__name__} on the server.')
  return await _explain(request, found)
