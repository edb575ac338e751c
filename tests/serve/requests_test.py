"""Tests of reading bodies; `app_test.py` has what is refused."""

import copy
import json

import numpy as np
import pytest

pytest.importorskip('starlette')

from grit_jax.serve.requests import (  # noqa: E402
  RequestError,
  parse_chat,
  parse_embeddings,
)

CHAT = {
  'model': 'm',
  'messages': [
    {'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]},
    {'role': 'assistant', 'content': 'b'},
    {'role': 'user', 'content': 'c'},
  ],
  'temperature': 1.0,
  'top_p': 0.5,
  'top_k': 3,
  'seed': 1,
  'max_tokens': 4,
  'stop': ['x'],
  'stream': True,
  'stream_options': {'include_usage': True},
  'n': 1,
  'response_format': {'type': 'text'},
  'user': 'u',
}
EMBEDDINGS = {
  'model': 'm',
  'input': ['a', 'b'],
  'instruction': 'i',
  'encoding_format': 'base64',
  'dimensions': 8,
}
VALUES = [
  None, True, 0, -1, 2**70, 0.5, 1e300, '', 'a', '\ud800', [], [None], [[]],
  ['a', 1], {}, {'role': 1}, {'type': 'text'}, [{'role': 'user'}],
]  # fmt: skip
DRAWS = 3000


def change(body: object, rng: np.random.Generator) -> object:
  """Puts a strange value somewhere into a body."""
  if not isinstance(body, dict | list) or not body or rng.random() < 0.2:
    return VALUES[rng.integers(len(VALUES))]
  body = copy.copy(body)
  keys = list(body) if isinstance(body, dict) else range(len(body))
  key = keys[rng.integers(len(keys))]
  body[key] = change(body[key], rng)
  return body


def test_whatever_comes_is_read_or_refused():
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(DRAWS):
    for parse, body in (
      (lambda text: parse_chat(text, 'm', 16), CHAT),
      (lambda text: parse_embeddings(text, 'm', 8), EMBEDDINGS),
    ):
      try:
        parse(json.dumps(change(body, rng)).encode())
      except RequestError as error:
        refused += 1
        assert 400 <= error.status < 500 and error.message
        json.dumps(error.body)
  assert DRAWS / 2 < refused < 2 * DRAWS


def test_a_chat_without_settings_has_those_of_openai():
  body = {'model': 'm', 'messages': CHAT['messages'], 'stop': None}
  found = parse_chat(json.dumps(body).encode(), 'm', 16)
  assert found.sampling.temperature == 1 and found.sampling.top_p == 1
  assert found.sampling.max_new_tokens == 16
  assert not found.sampling.top_k and not found.sampling.stop
  assert not found.stream


@pytest.mark.parametrize('seed', [-1, 2**63 - 1, 5])
def test_a_seed_of_64_bits_is_one_of_32(seed: int):
  found = parse_chat(json.dumps(CHAT | {'seed': seed}).encode(), 'm', 16)
  assert found.sampling.seed == seed % 2**32


@pytest.mark.parametrize('role', ['system', 'developer'])
def test_an_empty_system_message_is_none(role: str):
  messages = [{'role': role, 'content': ''}, *CHAT['messages']]
  found = parse_chat(
    json.dumps(CHAT | {'messages': messages}).encode(), 'm', 16
  )
  without = parse_chat(json.dumps(CHAT).encode(), 'm', 16)
  assert found.messages == without.messages
