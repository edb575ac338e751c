"""The bodies of requests, checked field by field.

What OpenAI's protocol has and this server has not is ignored where it changes
no answer, or where it has the value that changes none; else it is refused with
status 400, as is a field that nobody knows.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from grit_jax.inference.sampling import Sampling

# Texts of one request, and their tokens with their instructions, as OpenAI has
# it.
MAX_INPUTS = 2048
MAX_REQUEST_TOKENS = 300_000
# A text is refused before it is tokenised if it has more characters than this a
# token. The longest pieces of sentencepiece have 16.
TOKEN_CHARACTERS = 32
MAX_STOPS = 4
# The end of an answer is compared with every beginning of a stop string.
MAX_STOP_CHARACTERS = 1000
MAX_TEMPERATURE = 2.0

# What may be anything: it changes no answer.
_IGNORED = (
  'metadata', 'parallel_tool_calls', 'prompt_cache_key', 'prompt_cache_options',
  'prompt_cache_retention', 'safety_identifier', 'service_tier', 'user',
)  # fmt: skip
# What may be left out, null, or one of these.
_DEFAULTS = {
  'audio': (),
  'frequency_penalty': (0,),
  'function_call': ('none', 'auto'),
  'functions': ([],),
  'logit_bias': ({},),
  'logprobs': (False,),
  'modalities': (['text'],),
  'moderation': (),
  'n': (1,),
  'prediction': (),
  'presence_penalty': (0,),
  'reasoning_effort': ('none',),
  'response_format': ({'type': 'text'},),
  'store': (False,),
  'tool_choice': ('none', 'auto'),
  'tools': ([],),
  'top_logprobs': (0,),
  'verbosity': ('medium',),
  'web_search_options': (),
}


class RequestError(Exception):
  """A request that gets no answer but the reason.

  Attributes:
    status: Of the response.
    message: The reason, for the client's user.
    param: The field that it is about, or None.
    code: What OpenAI calls it, or None.
    headers: Of the response.
  """

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    """Keeps what the response says."""
    super().__init__(message)
    self.status, self.message = status, message
    self.param, self.code, self.headers = param, code, headers

  @property
  def body(self) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: 'authentication_error', 429: 'rate_limit_error'}
    kind = 'invalid_request_error' if self.status < 500 else 'server_error'
    return {
      'error': {
        'message': self.message,
        'type': kinds.get(self.status, kind),
        'param': self.param,
        'code': self.code,
      }
    }


@dataclasses.dataclass(frozen=True)
class EmbeddingRequest:
  """Texts to embed.

  Attributes:
    texts: One or more.
    instruction: As `GritLM.encode` takes it.
    base64: Whether embeddings go out as base64, not as lists.
  """

  texts: tuple[str, ...]
  instruction: str
  base64: bool


@dataclasses.dataclass(frozen=True)
class ChatRequest:
  """A conversation to answer.

  Attributes:
    messages: As `GritLM.generate` takes them.
    sampling: How to answer; without `max_tokens` as long as is allowed.
    stream: Whether the answer goes out in pieces.
    include_usage: Whether a stream ends with the numbers of tokens.
  """

  messages: tuple[dict[str, str], ...]
  sampling: Sampling
  stream: bool
  include_usage: bool


def parse_embeddings(body: bytes, name: str, width: int) -> EmbeddingRequest:
  """Reads the body of an embedding request.

  Args:
    body: The JSON.
    name: What the model is called.
    width: The size of its embeddings.

  Raises:
    RequestError: It cannot be answered.
  """
  fields = _Fields.parse(body)
  fields.take_model(name)
  texts = _take_texts(fields)
  instruction = fields.take_text('instruction', '')
  encoding = fields.take('encoding_format', 'float')
  if encoding not in ('float', 'base64'):
    raise _refuse(
      'encoding_format', f"{encoding!r:.100} is neither 'float' nor 'base64'"
    )
  if (dimensions := fields.take('dimensions', width)) != width:
    raise _refuse(
      'dimensions',
      f'{dimensions!r:.100} is not {width}, the size of the embeddings, which '
      'are not cut',
    )
  fields.finish({})
  return EmbeddingRequest(texts, instruction, encoding == 'base64')


def parse_chat(body: bytes, name: str, max_new_tokens: int) -> ChatRequest:
  """Reads the body of a chat request.

  Args:
    body: The JSON.
    name: What the model is called.
    max_new_tokens: The most tokens of an answer.

  Raises:
    RequestError: It cannot be answered.
  """
  fields = _Fields.parse(body)
  fields.take_model(name)
  messages = _take_messages(fields)
  limits = {
    key: fields.take_integer(key, 0, 1, max_new_tokens)
    for key in ('max_completion_tokens', 'max_tokens')
    if key in fields.fields
  }
  if len(set(limits.values())) > 1:
    raise _refuse('max_tokens', 'max_completion_tokens is given too, and other')
  sampling = Sampling(
    max_new_tokens=min(limits.values(), default=max_new_tokens),
    temperature=fields.take_number('temperature', 1.0, 0, MAX_TEMPERATURE),
    top_k=fields.take_integer('top_k', 0, 0, 2**31 - 1),
    top_p=fields.take_number('top_p', 1.0, 0, 1),
    seed=_take_seed(fields),
    stop=_take_stops(fields),
  )
  if not sampling.top_p:
    raise _refuse('top_p', '0 is no share; temperature=0 takes the best token')
  stream = fields.take_flag('stream', False)
  options = fields.take('stream_options', None)
  if options is not None and not stream:
    raise _refuse('stream_options', 'it is allowed with stream=true alone')
  options = _Fields.of(options or {}, 'stream_options')
  include_usage = options.take_flag('include_usage', False)
  options.take_flag('include_obfuscation', False)
  options.finish({})
  fields.finish(_DEFAULTS)
  return ChatRequest(messages, sampling, stream, include_usage)


class _Fields:
  """The fields of a JSON object, taken one by one; null is left out."""

  def __init__(self, fields: dict[str, Any], where: str):
    self.fields, self.where = fields, where

  @classmethod
  def parse(cls, body: bytes) -> '_Fields':
    try:
      value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
      raise RequestError(400, f'The body is not JSON: {error}') from error
    return cls.of(value, '')

  @classmethod
  def of(cls, value: Any, where: str) -> '_Fields':
    if not isinstance(value, dict):
      kind = _kind(value)
      raise RequestError(
        400,
        f'{where or "The body"} is {kind}, not an object.',
        where or None,
      )
    return cls({k: v for k, v in value.items() if v is not None}, where)

  def name(self, key: str) -> str:
    return f'{self.where}.{key}' if self.where else key

  def take(self, key: str, default: Any) -> Any:
    return self.fields.pop(key, default)

  def take_model(self, name: str) -> None:
    if 'model' not in self.fields:
      raise _refuse('model', 'it is missing')
    found = self.take_text('model', '')
    if found != name:
      raise RequestError(
        404,
        f'The model {found[:200]!r} does not exist; there is {name!r}.',
        'model',
        'model_not_found',
      )

  def take_text(self, key: str, default: str) -> str:
    return _check_text(self.take(key, default), self.name(key))

  def take_flag(self, key: str, default: bool) -> bool:
    value = self.take(key, default)
    if not isinstance(value, bool):
      raise _refuse(self.name(key), f'{_kind(value)} is not true or false')
    return value

  def take_number(
    self, key: str, default: float, low: float, high: float
  ) -> float:
    value = self.take(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise _refuse(self.name(key), f'{_kind(value)} is not a number')
    self._check_bounds(key, value, low, high)
    return float(value)

  def take_integer(
    self, key: str, default: int, low: float, high: float
  ) -> int:
    value = self.take(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
      raise _refuse(self.name(key), f'{_kind(value)} is not an integer')
    self._check_bounds(key, value, low, high)
    return value

  def _check_bounds(
    self, key: str, value: float, low: float, high: float
  ) -> None:
    if not low <= value <= high:
      raise _refuse(self.name(key), f'it is not between {low} and {high}')

  def finish(self, defaults: Mapping[str, Sequence[Any]]) -> None:
    """Refuses what is left, unless it changes nothing."""
    for key, value in self.fields.items():
      if key in defaults:
        # True is 1 to Python, and `n` cannot be true.
        if not any(
          value == other and isinstance(value, bool) == isinstance(other, bool)
          for other in defaults[key]
        ):
          raise _refuse(
            key, f'{json.dumps(value)[:100]} is not supported; leave it out'
          )
      elif key not in _IGNORED or self.where:
        raise _refuse(self.name(key)[:200], 'there is no such field')


def _take_texts(fields: _Fields) -> tuple[str, ...]:
  value = fields.take('input', None)
  if value is None:
    raise _refuse('input', 'it is missing')
  texts = [value] if isinstance(value, str) else value
  if not isinstance(texts, list):
    raise _refuse('input', f'{_kind(value)} is not a string or a list')
  if not 1 <= len(texts) <= MAX_INPUTS:
    raise _refuse('input', f'{len(texts)} texts are not 1 to {MAX_INPUTS}')
  for number, text in enumerate(texts):
    where = f'input[{number}]' if texts is value else 'input'
    if isinstance(text, int | list):
      raise _refuse(
        'input',
        'token ids are not taken: those of another tokenizer would be read as '
        'another text; send strings',
      )
    _check_text(text, where)
  return tuple(texts)


def _take_messages(fields: _Fields) -> tuple[dict[str, str], ...]:
  """Reads the messages; what a system message says goes before the first."""
  found = fields.take('messages', None)
  if found is None:
    raise _refuse('messages', 'it is missing')
  if not isinstance(found, list) or not found:
    raise _refuse('messages', 'it is not a list of messages')
  turns = []
  for number, value in enumerate(found):
    where = f'messages[{number}]'
    message = _Fields.of(value, where)
    turns.append((message.take_text('role', ''), _take_content(message)))
    message.take('name', None)
    for key, field in message.fields.items():
      # What clients send back of an answer, where there is nothing in it.
      if field:
        raise _refuse(
          message.name(key)[:200], 'it is not supported; leave it out'
        )
  system = ''
  offset = 0
  if turns[0][0] in ('system', 'developer'):
    system, offset = turns.pop(0)[1], 1
  messages = []
  for number, (role, content) in enumerate(turns):
    expected = ('user', 'assistant')[number % 2]
    if role != expected:
      raise _refuse(
        f'messages[{number + offset}].role',
        f'{role[:100]!r} is not {expected!r}: there may be a system message '
        'first, then user and assistant alternate',
      )
    messages.append({'role': role, 'content': content})
  if len(messages) % 2 == 0:
    raise _refuse('messages', "the last one is not the user's")
  if system:
    messages[0]['content'] = f'{system}\n\n{messages[0]["content"]}'
  return tuple(messages)


def _take_content(message: _Fields) -> str:
  """Reads a text, or the texts of parts, one a line."""
  value = message.take('content', None)
  where = message.name('content')
  if not isinstance(value, list):
    return _check_text(value, where)
  texts = []
  for number, item in enumerate(value):
    part = _Fields.of(item, f'{where}[{number}]')
    if part.take('type', None) != 'text':
      raise _refuse(part.name('type'), "only parts of the type 'text' are read")
    texts.append(_check_text(part.take('text', None), part.name('text')))
  return '\n'.join(texts)


def _take_seed(fields: _Fields) -> int:
  if 'seed' not in fields.fields:
    return secrets.randbits(32)
  # OpenAI's is of 64 bits and may be negative; ours are of 32.
  return fields.take_integer('seed', 0, -(2**63), 2**63 - 1) % 2**32


def _take_stops(fields: _Fields) -> tuple[str, ...]:
  value = fields.take('stop', [])
  stops = [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or len(stops) > MAX_STOPS:
    raise _refuse('stop', f'it is not a string, or a list of up to {MAX_STOPS}')
  for stop in stops:
    if not _check_text(stop, 'stop'):
      raise _refuse('stop', 'an empty string stops nothing')
    if len(stop) > MAX_STOP_CHARACTERS:
      raise _refuse(
        'stop', f'a string is longer than {MAX_STOP_CHARACTERS} characters'
      )
  return tuple(stops)


def _check_text(value: Any, where: str) -> str:
  if not isinstance(value, str):
    raise _refuse(where, f'{_kind(value)} is not a string')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise _refuse(where, 'it is no valid Unicode') from error
  return value


def _refuse(param: str, reason: str) -> RequestError:
  return RequestError(400, f'{param}: {reason}.', param)


def _refuse_constant(name: str) -> float:
  raise ValueError(f'{name} is no number of JSON')


def _kind(value: Any) -> str:
  """Names what a JSON value is, as a sentence says it."""
  names = {
    dict: 'an object', list: 'a list', str: 'a string', bool: 'a truth value',
    int: 'a number', float: 'a number', type(None): 'nothing',
  }  # fmt: skip
  return names[type(value)]
