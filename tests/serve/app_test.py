"""Tests of the server, over HTTP and with OpenAI's client."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

openai = pytest.importorskip('openai')
pytest.importorskip('starlette')
pytest.importorskip('uvicorn')

from running_server import (  # noqa: E402
  KEY,
  LIMITS,
  MODEL,
  NAME,
  PATIENCE,
  Running,
  run,
  wait_until,
)

from grit_jax import GritLM  # noqa: E402
from grit_jax.config import Config  # noqa: E402
from grit_jax.data.tokenizer import Tokenizer  # noqa: E402
from grit_jax.inference.generation import Generation  # noqa: E402
from grit_jax.inference.sampling import Sampling  # noqa: E402
from grit_jax.serve.requests import (  # noqa: E402
  MAX_INPUTS,
  MAX_REQUEST_TOKENS,
)

# float32, in calls of other shapes; embeddings have length 1.
TOLERANCE = 1e-5

INSTRUCTION = 'Find the answer'
TEXTS = [f'{word} of text {i}' for i, word in enumerate(['A', 'Some'] * 8)]
# Of 33 to 64 tokens: their batches have the same shapes.
MESSAGES = [
  [{'role': 'user', 'content': f'What is item {i}?'}] for i in range(8)
]
# That ask at one time.
CLIENTS = 16
# Seconds that a token takes in tests of what comes between steps.
SLOW = 0.05
# Seconds after which a client goes away: its request has come by then, and the
# longest answer takes several times as long.
LEAVES = 2.0


@pytest.fixture(scope='module')
def model(
  tmp_path_factory: pytest.TempPathFactory, write_run: Callable
) -> GritLM:
  path = tmp_path_factory.mktemp('serve') / 'checkpoint'
  write_run(path, Config(model=MODEL))
  return GritLM.load(path)


@pytest.fixture(scope='module')
def running(model: GritLM) -> Iterator[Running]:
  with run(model) as found:
    yield found


@pytest.fixture(scope='module')
def client(running: Running) -> openai.OpenAI:
  return running.client()


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch):
  step = Generation.step

  def step_slowly(self: Generation, tokens: int) -> None:
    time.sleep(SLOW * tokens)
    step(self, tokens)

  monkeypatch.setattr(Generation, 'step', step_slowly)


def chat(client: openai.OpenAI, number: int = 0, **arguments) -> Any:
  return client.chat.completions.create(
    model=NAME, messages=MESSAGES[number], **arguments
  )


def read(stream: Any) -> str:
  return ''.join(
    piece.choices[0].delta.content or '' for piece in stream if piece.choices
  )


@pytest.mark.parametrize('encoding', [openai.NOT_GIVEN, 'float', 'base64'])
def test_embeddings_are_those_of_encode(
  model: GritLM, client: openai.OpenAI, encoding: Any
):
  found = client.embeddings.create(
    model=NAME,
    input=TEXTS,
    encoding_format=encoding,
    dimensions=MODEL.embed_dim,
    user='somebody',
    extra_body={'instruction': INSTRUCTION},
  )
  rows = [
    np.frombuffer(base64.b64decode(item.embedding), '<f4')
    if isinstance(item.embedding, str)
    else np.array(item.embedding)
    for item in found.data
  ]
  expected = model.encode(TEXTS, INSTRUCTION)
  np.testing.assert_allclose(rows, expected, atol=TOLERANCE)
  assert [item.index for item in found.data] == list(range(len(TEXTS)))
  count = sum(model.count_tokens(TEXTS, INSTRUCTION))
  assert found.usage.prompt_tokens == found.usage.total_tokens == count


def test_texts_of_more_than_a_call_come_back_in_order(
  model: GritLM, client: openai.OpenAI
):
  texts = [f'{i} ' * (i + 1) for i in range(24)]
  room = LIMITS.max_batch * LIMITS.max_input_tokens
  assert sum(model.count_tokens(texts)) > 2 * room
  found = client.embeddings.create(model=NAME, input=texts)
  np.testing.assert_allclose(
    [item.embedding for item in found.data],
    model.encode(texts),
    atol=TOLERANCE,
  )


def test_one_text_needs_no_list(model: GritLM, client: openai.OpenAI):
  found = client.embeddings.create(model=NAME, input=TEXTS[0])
  np.testing.assert_allclose(
    [item.embedding for item in found.data],
    [model.encode(TEXTS[0])],
    atol=TOLERANCE,
  )


def test_a_greedy_answer_is_that_of_generate(
  model: GritLM, client: openai.OpenAI
):
  found = chat(client, temperature=0, max_tokens=12)
  prompt = model.encode_prompt(MESSAGES[0], Sampling(max_new_tokens=1))
  [choice] = found.choices
  assert choice.message.content == model.generate(
    MESSAGES[0], max_new_tokens=12
  )
  assert choice.message.role == 'assistant'
  assert choice.finish_reason == 'length'
  assert found.usage.prompt_tokens == len(prompt.ids)
  assert found.usage.completion_tokens == 12
  assert found.usage.total_tokens == len(prompt.ids) + 12


def test_a_drawn_answer_is_that_of_generate(
  model: GritLM, client: openai.OpenAI
):
  settings = {'temperature': 0.8, 'top_p': 0.9, 'seed': 7}
  whole = model.generate(
    MESSAGES[0], max_new_tokens=20, top_k=50, stop=(), **settings
  )
  stop = whole[5:7]
  found = chat(
    client,
    max_completion_tokens=20,
    stop=[stop, 'never'],
    extra_body={'top_k': 50},
    **settings,
  )
  assert found.choices[0].message.content == whole[: whole.find(stop)]
  assert found.choices[0].finish_reason == 'stop'


def test_without_a_seed_answers_differ(client: openai.OpenAI):
  first, second = (
    chat(client, max_tokens=12).choices[0].message.content for _ in range(2)
  )
  assert first != second


def test_a_system_message_goes_before_the_first(
  model: GritLM, client: openai.OpenAI
):
  found = client.chat.completions.create(
    model=NAME,
    messages=[
      {'role': 'system', 'content': 'Be'},
      {
        'role': 'user',
        'content': [
          {'type': 'text', 'text': 'a'},
          {'type': 'text', 'text': 'b'},
        ],
      },
      {'role': 'assistant', 'content': 'c', 'tool_calls': []},
      {'role': 'user', 'content': 'd', 'name': 'Ada'},
    ],
    temperature=0,
    max_tokens=8,
  )
  expected = model.generate(
    [
      {'role': 'user', 'content': 'Be\n\na\nb'},
      {'role': 'assistant', 'content': 'c'},
      {'role': 'user', 'content': 'd'},
    ],
    max_new_tokens=8,
  )
  assert found.choices[0].message.content == expected


def test_an_answer_ends_at_the_last_position(
  model: GritLM, client: openai.OpenAI
):
  messages = [{'role': 'user', 'content': 'of a parser of a ' * 2}]
  prompt = model.encode_prompt(messages, Sampling(max_new_tokens=1))
  found = client.chat.completions.create(
    model=NAME, messages=messages, temperature=0
  )
  assert found.choices[0].finish_reason == 'length'
  assert found.usage.total_tokens == MODEL.max_positions
  assert found.usage.prompt_tokens == len(prompt.ids)


def test_a_stream_is_the_answer_in_pieces(model: GritLM, client: openai.OpenAI):
  pieces = list(
    chat(
      client,
      temperature=0,
      max_tokens=20,
      stream=True,
      stream_options={'include_usage': True},
    )
  )
  *others, end, usage = pieces
  text = ''.join(piece.choices[0].delta.content or '' for piece in others)
  assert text == model.generate(MESSAGES[0], max_new_tokens=20)
  assert len([p for p in others if p.choices[0].delta.content]) > 5
  assert others[0].choices[0].delta.role == 'assistant'
  assert {piece.choices[0].finish_reason for piece in others} == {None}
  assert end.choices[0].finish_reason == 'length'
  assert not usage.choices and usage.usage.completion_tokens == 20
  assert {piece.usage for piece in [*others, end]} == {None}
  assert len({(piece.id, piece.created, piece.model) for piece in pieces}) == 1


def test_a_stream_ends_with_done(running: Running):
  body = {
    'model': NAME, 'messages': MESSAGES[0], 'max_tokens': 2, 'stream': True,
  }  # fmt: skip
  status, headers, found = running.ask('/v1/chat/completions', body)
  assert status == 200
  assert headers['content-type'].startswith('text/event-stream')
  *events, last, nothing = found.decode().split('\n\n')
  assert last == 'data: [DONE]' and not nothing
  for event in events:
    assert 'usage' not in json.loads(event.removeprefix('data: '))


def test_parallel_clients_each_get_their_own(model: GritLM, running: Running):
  embeddings = {
    instruction: model.encode(TEXTS, instruction)
    for instruction in ('', INSTRUCTION)
  }
  drawn = [
    model.generate(messages, max_new_tokens=10, temperature=1.0, seed=number)
    for number, messages in enumerate(MESSAGES)
  ]

  def ask(number: int) -> None:
    client = running.client()
    for turn in range(2):
      text = (number + turn) % len(TEXTS)
      kind = (number + turn) % 4
      if kind < 2:
        instruction = ('', INSTRUCTION)[kind]
        found = client.embeddings.create(
          model=NAME,
          input=[TEXTS[text], TEXTS[-1]],
          extra_body={'instruction': instruction},
        )
        np.testing.assert_allclose(
          [item.embedding for item in found.data],
          embeddings[instruction][[text, -1]],
          atol=TOLERANCE,
        )
        continue
      which = number % len(MESSAGES)
      found = chat(client, which, max_tokens=10, seed=which, stream=kind == 3)
      if kind == 3:
        assert read(found) == drawn[which]
      else:
        assert found.choices[0].message.content == drawn[which]

  with ThreadPoolExecutor(CLIENTS) as pool:
    assert len(list(pool.map(ask, range(CLIENTS)))) == CLIENTS


@pytest.fixture(scope='module')
def long_chat(model: GritLM) -> dict[str, Any]:
  """What asks for an answer that goes on for as long as it may."""
  settings = Sampling(max_new_tokens=LIMITS.max_new_tokens)
  for messages in MESSAGES:
    [found] = model.complete([model.encode_prompt(messages, settings)])
    if found.finish_reason == 'length':
      return {'model': NAME, 'messages': messages, 'temperature': 0}
  raise AssertionError('all answers end early: choose other messages')


def find_generation(running: Running) -> Generation:
  """Returns the batch that runs, which is the only one."""
  batcher = running.service._batcher
  # One that its client has left may take a step more.
  wait_until(lambda: len(batcher._running) == 1)
  [(generation, _)] = batcher._running
  return generation


def test_texts_and_chats_do_not_wait_for_a_long_answer(
  running: Running, client: openai.OpenAI, long_chat: dict, slow_steps: None
):
  with client.chat.completions.create(**long_chat, stream=True) as stream:
    next(stream)
    generation = find_generation(running)
    client.embeddings.create(model=NAME, input=TEXTS[0])
    assert not generation.done
    chat(client, max_tokens=2)
    assert not generation.done


def test_a_client_that_goes_away_is_not_generated_for(
  running: Running, client: openai.OpenAI, long_chat: dict, slow_steps: None
):
  stream = client.chat.completions.create(**long_chat, stream=True)
  next(stream), next(stream)
  generation = find_generation(running)
  stream.close()
  wait_until(lambda: not running.service._batcher._running)
  assert generation.done
  assert len(generation.texts[0].ids) < LIMITS.max_new_tokens
  # And without a stream.
  hasty = client.with_options(timeout=LEAVES)
  with ThreadPoolExecutor(1) as pool:
    asked = pool.submit(hasty.chat.completions.create, **long_chat)
    generation = find_generation(running)
    with pytest.raises(openai.APITimeoutError):
      asked.result()
  wait_until(lambda: not running.service._batcher._running)
  assert len(generation.texts[0].ids) < LIMITS.max_new_tokens


def test_a_full_queue_is_told_and_lost_clients_leave_it(
  running: Running, monkeypatch: pytest.MonkeyPatch
):
  entered, released = threading.Event(), threading.Event()
  encode = GritLM.encode

  def encode_later(self: GritLM, *arguments, **more) -> np.ndarray:
    entered.set()
    assert released.wait(PATIENCE)
    return encode(self, *arguments, **more)

  monkeypatch.setattr(GritLM, 'encode', encode_later)
  batcher = running.service._batcher
  body = {'model': NAME, 'input': TEXTS[0]}

  def ask(number: int) -> int:
    return running.ask('/v1/embeddings', body)[0]

  with ThreadPoolExecutor(LIMITS.max_queue + 1) as pool:
    try:
      begun = pool.submit(ask, 0)
      assert entered.wait(PATIENCE)
      asked = pool.submit(chat, running.client().with_options(timeout=LEAVES))
      wait_until(lambda: batcher._chats)
      with pytest.raises(openai.APITimeoutError):
        asked.result()
      wait_until(lambda: not batcher._chats)
      others = [pool.submit(ask, i) for i in range(LIMITS.max_queue)]
      wait_until(lambda: len(batcher._embeddings) == LIMITS.max_queue)
      status, headers, found = running.ask('/v1/embeddings', body)
    finally:
      released.set()
    assert {answer.result() for answer in (begun, *others)} == {200}
  assert status == 429 and headers['retry-after'] == '1'
  assert json.loads(found)['error']['code'] == 'rate_limit_exceeded'


BAD = [
  # path, changes of the body, status, the field, and a part of the reason
  ('embeddings', {'model': 'other'}, 404, 'model', 'does not exist'),
  ('embeddings', {'model': None}, 400, 'model', 'missing'),
  ('embeddings', {'model': 3}, 400, 'model', 'not a string'),
  ('embeddings', {'input': None}, 400, 'input', 'missing'),
  ('embeddings', {'input': []}, 400, 'input', '0 texts'),
  ('embeddings', {'input': ['a'] * 2049}, 400, 'input', '2048'),
  ('embeddings', {'input': 'ab ' * 200}, 400, 'input', 'more than the 150'),
  ('embeddings', {'input': ['a', '']}, 400, 'input[1]', 'empty'),
  ('embeddings', {'input': [1, 2]}, 400, 'input', 'token ids'),
  ('embeddings', {'input': [[1, 2]]}, 400, 'input', 'token ids'),
  ('embeddings', {'input': {'a': 1}}, 400, 'input', 'an object'),
  ('embeddings', {'input': '\ud800'}, 400, 'input', 'Unicode'),
  ('embeddings', {'dimensions': 8}, 400, 'dimensions', 'not cut'),
  ('embeddings', {'encoding_format': 'f'}, 400, 'encoding_format', 'base64'),
  ('embeddings', {'instruction': 1}, 400, 'instruction', 'not a string'),
  ('embeddings', {'inputs': 'a'}, 400, 'inputs', 'no such field'),
  ('chat/completions', {'messages': None}, 400, 'messages', 'missing'),
  ('chat/completions', {'messages': []}, 400, 'messages', 'not a list'),
  ('chat/completions', {'messages': ['a']}, 400, 'messages[0]', 'object'),
  (
    'chat/completions',
    {'messages': [{'role': 'tool', 'content': 'a'}]},
    400, 'messages[0].role', 'alternate',
  ),
  (
    'chat/completions',
    {'messages': [{'role': 'system', 'content': 'a'}]},
    400, 'messages', "user's",
  ),
  (
    'chat/completions',
    {'messages': [{'role': 'user', 'content': 3}]},
    400, 'messages[0].content', 'not a string',
  ),
  (
    'chat/completions',
    {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]},
    400, 'messages[0].content[0].type', 'text',
  ),
  (
    'chat/completions',
    {'messages': [{'role': 'user', 'content': 'a', 'audio': {'id': 1}}]},
    400, 'messages[0].audio', 'not supported',
  ),
  (
    'chat/completions',
    {'messages': [{'role': 'user', 'content': 'ab ' * 70}]},
    400, 'messages', 'more than the 150',
  ),
  ('chat/completions', {'max_tokens': 0}, 400, 'max_tokens', 'between'),
  ('chat/completions', {'max_tokens': 151}, 400, 'max_tokens', '150'),
  (
    'chat/completions',
    {'max_tokens': 2, 'max_completion_tokens': 3},
    400, 'max_tokens', 'max_completion_tokens',
  ),
  ('chat/completions', {'temperature': 'a'}, 400, 'temperature', 'a number'),
  ('chat/completions', {'temperature': 2.1}, 400, 'temperature', 'between'),
  ('chat/completions', {'temperature': True}, 400, 'temperature', 'truth'),
  ('chat/completions', {'top_p': 0}, 400, 'top_p', 'share'),
  ('chat/completions', {'top_k': 2**40}, 400, 'top_k', 'between'),
  ('chat/completions', {'seed': 1.5}, 400, 'seed', 'integer'),
  ('chat/completions', {'stop': ['a'] * 5}, 400, 'stop', 'up to 4'),
  ('chat/completions', {'stop': ''}, 400, 'stop', 'empty'),
  ('chat/completions', {'stream': 'yes'}, 400, 'stream', 'true or false'),
  (
    'chat/completions',
    {'stream_options': {'include_usage': True}},
    400, 'stream_options', 'stream=true',
  ),
  ('chat/completions', {'n': 2}, 400, 'n', 'not supported'),
  ('chat/completions', {'n': True}, 400, 'n', 'not supported'),
  ('chat/completions', {'logprobs': True}, 400, 'logprobs', 'not supported'),
  ('chat/completions', {'tools': [{}]}, 400, 'tools', 'not supported'),
  (
    'chat/completions',
    {'response_format': {'type': 'json_object'}},
    400, 'response_format', 'not supported',
  ),
  ('chat/completions', {'temprature': 1}, 400, 'temprature', 'no such field'),
]  # fmt: skip


@pytest.mark.parametrize(
  'path, changes, status, param, reason',
  BAD,
  ids=[f'{param}-{reason}' for _, _, _, param, reason in BAD],
)
def test_a_bad_request_is_told_why(
  running: Running, path: str, changes: dict, status: int, param: str,
  reason: str,
):  # fmt: skip
  good = {
    'embeddings': {'model': NAME, 'input': 'a'},
    'chat/completions': {'model': NAME, 'messages': MESSAGES[0]},
  }[path]
  found, _, answer = running.ask(f'/v1/{path}', good | changes)
  error = json.loads(answer)['error']
  assert (found, error['param']) == (status, param)
  assert reason in error['message'] and param in error['message']
  assert error['type'] == 'invalid_request_error'


LONG = 'a ' * 4_900  # Nearly half of a body.
TOO_LARGE = [
  ('embeddings', {'input': LONG}, 'input'),
  ('embeddings', {'input': ['a', 'b'], 'instruction': LONG}, 'input[0]'),
  (
    'embeddings',
    {'input': ['a'] * 1_500, 'instruction': LONG},
    'input[0]',
  ),
  (
    'chat/completions',
    {'messages': [{'role': 'user', 'content': LONG}]},
    'messages',
  ),
  (
    'chat/completions',
    {'messages': [{'role': 'system', 'content': LONG}, *MESSAGES[0]]},
    'messages',
  ),
  (
    'chat/completions',
    {
      'messages': [
        {'role': role, 'content': ''} for role in ('user', 'assistant') * 200
      ]
      + MESSAGES[0]
    },
    'messages',
  ),
  (
    'chat/completions',
    {'messages': MESSAGES[0], 'stop': ['b', 'a' * 1001]},
    'stop',
  ),
]


@pytest.mark.parametrize(
  'path, body, param', TOO_LARGE, ids=range(len(TOO_LARGE))
)
def test_what_is_too_large_is_refused_before_it_is_tokenised(
  running: Running,
  monkeypatch: pytest.MonkeyPatch,
  path: str,
  body: dict,
  param: str,
):
  def refuse(*arguments) -> None:
    raise AssertionError('it is tokenised')

  monkeypatch.setattr(Tokenizer, 'encode_parts_batch', refuse)
  status, _, answer = running.ask(f'/v1/{path}', {'model': NAME, **body})
  error = json.loads(answer)['error']
  assert (status, error['param']) == (400, param)
  assert 'characters' in error['message']


def test_texts_that_are_too_much_together_are_refused_at_the_first_of_them(
  model: GritLM, running: Running, monkeypatch: pytest.MonkeyPatch
):
  most = LIMITS.max_input_tokens
  instruction = 'a '
  while model.count_tokens(['b'], instruction)[0] < most - 2:
    instruction += 'a '
  count = MAX_REQUEST_TOKENS // model.count_tokens(['b'], instruction)[0]
  tokenised = []
  encode = Tokenizer.encode_parts_batch

  def watch(self: Tokenizer, batch: Any) -> Any:
    tokenised.extend(''.join(parts) for parts in batch)
    return encode(self, batch)

  monkeypatch.setattr(Tokenizer, 'encode_parts_batch', watch)
  status, _, answer = running.ask(
    '/v1/embeddings',
    {
      'model': NAME, 'input': ['b'] * MAX_INPUTS, 'instruction': instruction,
    },
  )  # fmt: skip
  error = json.loads(answer)['error']
  assert (status, error['param']) == (400, 'input')
  assert f'{MAX_REQUEST_TOKENS} that a request may have' in error['message']
  assert len(tokenised) == count + 1 < MAX_INPUTS


@pytest.mark.parametrize(
  'body',
  [b'', b'{', b'[]', b'"a"', b'\xff', b'[' * 9999, b'{"seed": NaN}'],
)
def test_a_body_that_is_no_object_is_told_so(running: Running, body: bytes):
  for path in ('embeddings', 'chat/completions'):
    status, _, found = running.ask(f'/v1/{path}', body)
    assert status == 400
    assert 'The body is' in json.loads(found)['error']['message']


def test_what_changes_no_answer_may_be_sent(client: openai.OpenAI):
  chat(
    client, max_tokens=1, n=1, frequency_penalty=0, presence_penalty=0.0,
    logprobs=False, logit_bias={}, response_format={'type': 'text'}, tools=[],
    user='somebody', metadata={'a': 'b'}, service_tier='auto', store=False,
    top_logprobs=None,
  )  # fmt: skip


def test_a_large_body_is_refused(running: Running):
  large = b' ' * (LIMITS.max_body_bytes + 1)
  # With its length in a header, and without.
  for body in (large, iter([large])):
    status, _, found = running.ask('/v1/embeddings', body)
    assert status == 413
    assert '20000 bytes' in json.loads(found)['error']['message']


def test_paths_methods_and_keys(running: Running):
  for method, path, key, status in (
    ('GET', '/health', '', 200),
    ('GET', '/v1/models', KEY, 200),
    ('GET', '/v1/models', '', 401),
    ('GET', f'/v1/models/{NAME}', KEY, 200),
    ('GET', f'/v1/models/{NAME}', 'other', 401),
    ('GET', '/v1/models/other', KEY, 404),
    ('GET', '/v1/other', KEY, 404),
    ('GET', '/v1/embeddings', KEY, 405),
    ('POST', '/v1/models', KEY, 405),
    ('POST', '/v1/embeddings', 'other', 401),
    ('POST', '/v1/chat/completions', '', 401),
  ):
    found, _, body = running.ask(path, {}, method, key)
    assert found == status, (method, path)
    assert ('error' in json.loads(body)) == (status >= 400)


def test_the_model_is_listed(client: openai.OpenAI):
  [found] = client.models.list().data
  assert found.id == NAME
  assert client.models.retrieve(NAME) == found


def test_a_failure_ends_its_requests_alone(
  client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
):
  def fail(*arguments, **more):
    raise RuntimeError('of the device')

  with monkeypatch.context() as patch:
    patch.setattr(GritLM, 'encode', fail)
    patch.setattr(Generation, 'step', fail)
    with pytest.raises(openai.InternalServerError, match='RuntimeError'):
      client.embeddings.create(model=NAME, input=TEXTS)
    with pytest.raises(openai.InternalServerError, match='RuntimeError'):
      chat(client, max_tokens=4)
    with pytest.raises(openai.APIError, match='RuntimeError'):
      read(chat(client, max_tokens=4, stream=True))
  client.embeddings.create(model=NAME, input=TEXTS)
  chat(client, max_tokens=4)


def test_a_server_that_stops_ends_what_runs(model: GritLM, long_chat: dict):
  with run(model) as running:
    stream = running.client().chat.completions.create(**long_chat, stream=True)
    first = next(stream)
    running.server.should_exit = True
    whole = read([first, *stream])
  assert whole == model.generate(
    long_chat['messages'], max_new_tokens=LIMITS.max_new_tokens
  )
  with pytest.raises(openai.APIConnectionError):
    running.client().models.list()


def test_a_server_that_stops_waits_no_longer_than_it_may(
  model: GritLM, long_chat: dict, slow_steps: None
):
  with run(model, stop_seconds=1) as running:
    stream = running.client().chat.completions.create(**long_chat, stream=True)
    next(stream)
    generation = find_generation(running)
  assert len(generation.texts[0].ids) < LIMITS.max_new_tokens
