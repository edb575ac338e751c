"""OpenAI's objects, as answers are given in."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.responses import Response

from grit_jax.inference.generation import Completion


def respond(
  content: Mapping[str, Any],
  status: int = 200,
  headers: Mapping[str, str] | None = None,
) -> Response:
  """Returns an object as JSON, in ASCII: in it may be what a client sent."""
  return Response(
    json.dumps(content), status, headers, media_type='application/json'
  )


def describe_model(name: str, created: int) -> dict[str, Any]:
  """Returns the model that there is."""
  return {
    'id': name,
    'object': 'model',
    'created': created,
    'owned_by': 'grit_jax',
  }


def make_embeddings(
  name: str, embeddings: np.ndarray, as_base64: bool, tokens: int
) -> dict[str, Any]:
  """Returns embeddings, float32 [texts, D], in the order of the texts."""
  data = [
    {
      'object': 'embedding',
      'index': index,
      'embedding': (
        base64.b64encode(row.astype('<f4').tobytes()).decode()
        if as_base64
        else row.tolist()
      ),
    }
    for index, row in enumerate(embeddings)
  ]
  usage = {'prompt_tokens': tokens, 'total_tokens': tokens}
  return {'object': 'list', 'data': data, 'model': name, 'usage': usage}


def make_answer(
  head: Mapping[str, Any], completion: Completion
) -> dict[str, Any]:
  """Returns a whole answer.

  Args:
    head: Its `id`, `created` and `model`.
    completion: The answer.
  """
  choice = {
    'index': 0,
    'message': {
      'role': 'assistant',
      'content': completion.text,
      'refusal': None,
    },
    'logprobs': None,
    'finish_reason': completion.finish_reason,
  }
  return {
    **head,
    'object': 'chat.completion',
    'choices': [choice],
    'usage': count_tokens(completion),
  }


def make_chunk(
  head: Mapping[str, Any],
  delta: Mapping[str, str] | None,
  finish_reason: str | None = None,
  **usage: Mapping[str, int] | None,
) -> dict[str, Any]:
  """Returns a piece of an answer.

  Args:
    head: As of `make_answer`, the same in all its pieces.
    delta: What is new; None: the piece has nothing but `usage`.
    finish_reason: In the last one, why the answer ends.
    **usage: `usage`, where the client asked for it.
  """
  choice = {
    'index': 0,
    'delta': delta,
    'logprobs': None,
    'finish_reason': finish_reason,
  }
  return {
    **head,
    'object': 'chat.completion.chunk',
    'choices': [] if delta is None else [choice],
    **usage,
  }


def make_event(content: Mapping[str, Any]) -> str:
  """Returns an object as a server-sent event."""
  return f'data: {json.dumps(content)}\n\n'


def count_tokens(completion: Completion) -> dict[str, int]:
  """Returns the numbers of tokens, the end of text included."""
  prompt, answer = completion.prompt_tokens, len(completion.ids)
  return {
    'prompt_tokens': prompt,
    'completion_tokens': answer,
    'total_tokens': prompt + answer,
  }
