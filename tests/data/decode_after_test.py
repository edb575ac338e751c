"""Tests of decoding tokens after those that stand before them."""

import os
from collections.abc import Callable

import numpy as np
import pytest

from grit_jax.data.tokenizer import Tokenizer
from grit_jax.inference.generation import Prompt, Text
from grit_jax.inference.sampling import Sampling

SPLITS = 10_000


@pytest.fixture(params=['tokenizer', 'llama3', 'llama2'])
def any_tokenizer(request) -> Tokenizer:
  return request.getfixturevalue(request.param)


def test_a_text_after_any_split_is_the_rest_of_the_whole_decoded(
  any_tokenizer: Tokenizer, make_nasty_texts: Callable
):
  rng = np.random.default_rng(0)
  texts = [*make_nasty_texts(500), 'a 🙂\ufffd b', ' \n  x', '</s> a', '🙂🙂']
  encoded = [ids for ids in any_tokenizer.encode_batch(texts) if ids]
  wholes = [any_tokenizer.decode(ids) for ids in encoded]
  within = 0
  for number in rng.integers(len(encoded), size=SPLITS):
    ids, whole = encoded[number], wholes[number]
    split = int(rng.integers(len(ids) + 1))
    before = any_tokenizer.decode(ids[:split])
    shared = os.path.commonprefix([before, whole])
    within += shared != before
    assert (
      any_tokenizer.decode_after(ids[:split], ids[split:])
      == (whole[len(shared) :])
    )
  # Some splits are within a character.
  assert within > SPLITS / 100


def start(tokenizer: Tokenizer, prompt: str, **settings) -> Text:
  ids = np.array(tokenizer.encode(prompt))
  return Text(tokenizer, Prompt(ids, ids < 0, Sampling(100, **settings)))


def continue_prompt(tokenizer: Tokenizer, prompt: str, text: str) -> list[int]:
  """Returns the tokens that `text` adds to those of the prompt."""
  ids = tokenizer.encode(prompt)
  whole = tokenizer.encode(prompt + text)
  assert whole[: len(ids)] == ids
  return whole[len(ids) :]


def test_a_generated_text_keeps_the_blanks_that_it_begins_with(
  any_tokenizer: Tokenizer,
):
  prompt, text = 'def one():\n', '    return 1'
  grown = start(any_tokenizer, prompt)
  shown = ''
  for token in continue_prompt(any_tokenizer, prompt, text):
    grown.add([token])
    shown += grown.take_new()
  assert shown == grown.text == text


def test_a_stop_string_with_a_blank_stops_at_the_start(
  any_tokenizer: Tokenizer,
):
  prompt = 'a\n'
  grown = start(any_tokenizer, prompt, stop=(' the',))
  grown.add(continue_prompt(any_tokenizer, prompt, ' the end'))
  assert grown.finish_reason == 'stop'
  assert grown.text == ''
