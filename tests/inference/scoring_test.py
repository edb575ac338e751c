"""Scores of continuations are sums of log-probabilities, however packed."""

import argparse
import dataclasses
import inspect
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest

from grit_jax.batch import Rows
from grit_jax.config import Config, EvaluationConfig, MeshConfig
from grit_jax.data.pipeline import place_batch
from grit_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.inference import scoring
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.sampling import Sampling
from grit_jax.inference.scoring import Candidate, encode_candidate
from grit_jax.models.attention import generative_kind
from grit_jax.models.decoder import Decoder
from grit_jax.models.presets import tiny

# Float32 log-probabilities of up to 100 tokens, added up; their logits are of
# size 10.
TOLERANCE = 2e-3
# Tokens of the longest prompt with its continuation, and more.
LENGTH = 256

PROMPTS = [
  'Question: which letter?\nAnswer:',
  'Question: which letter?\nAnswer:',
  'Question: which letter?\nAnswer:',
  'A blank at the end counts as the continuation: ',
  [{'role': 'user', 'content': 'What is this?'}],
  [
    {'role': 'user', 'content': 'One'},
    {'role': 'assistant', 'content': 'Two'},
    {'role': 'user', 'content': 'Three'},
  ],
  '',
  'long ' * 25,
]
CONTINUATIONS = [
  ' A', ' B', ' a longer one, of many tokens', 'yes', 'A chat.</s>', ' Four',
  'from nothing', 'longer ' * 12,
]  # fmt: skip


@pytest.fixture(scope='module')
def tokenizer() -> Tokenizer:
  return SentencePieceTokenizer(
    train_tokenizer([inspect.getsource(argparse)], 400)
  )


@pytest.fixture(scope='module')
def model_of(
  tokenizer: Tokenizer, mesh_of: Callable, random_decoder: Callable
) -> Callable[..., GritLM]:
  def make(*sizes: int, attention: str = 'bbcc', **changes) -> GritLM:
    model = dataclasses.replace(
      tiny(),
      vocab_size=tokenizer.vocab_size,
      num_layers=1,
      attention=attention,
      max_positions=600,
      **changes,
    )
    mesh = mesh_of(*(sizes or (1, 1, 1)))
    decoder = random_decoder(mesh, model)
    with jax.set_mesh(mesh):
      decoder = decoder.unstack()
    config = Config(
      model=model,
      mesh=MeshConfig(*(sizes or (1, 1, 1))),
      evaluation=EvaluationConfig(enabled=False),
    )
    return GritLM(config, decoder, tokenizer, mesh)

  return make


@partial(jax.jit, static_argnums=0)
def whole_logits(attention: str, model: Decoder, rows: Rows) -> jax.Array:
  (hidden,) = model([rows], [generative_kind(attention)])
  return model.logits(hidden, model.gather_head())


def define(model: GritLM, prompt, continuation: str) -> tuple[float, bool, int]:
  """Scores one continuation by the definition: whole logits of its own row."""
  tokenizer = model.tokenizer
  if isinstance(prompt, str):
    parts = [f'<s>{prompt}']
  else:
    contents = [message['content'] for message in prompt]
    parts = [f'<s><|user|>\n{contents[0]}\n<|assistant|>\n']
    for user, assistant in zip(contents[2::2], contents[1::2], strict=True):
      parts += [f'{assistant}</s>', f'\n<|user|>\n{user}\n<|assistant|>\n']
  ids, part = tokenizer.encode_parts(parts)
  instruction = part % 2 == 0
  whole = np.array(tokenizer.encode(''.join(parts) + continuation), np.int32)
  start = 0
  while start < len(ids) and ids[start] == whole[start]:
    start += 1
  instruction = np.append(instruction[:start], np.zeros(len(whole) - start))
  real = np.arange(LENGTH) < len(whole)
  rows = Rows(
    np.resize(whole, LENGTH), real.astype(np.int32),
    np.arange(LENGTH, dtype=np.int32), np.resize(instruction, LENGTH) > 0,
  )  # fmt: skip
  rows = jax.tree.map(
    lambda x: np.where(real, x, 0).astype(x.dtype)[None], rows
  )
  with jax.set_mesh(model.mesh):
    logits = whole_logits(
      model.config.model.attention,
      model.model,
      place_batch(model.mesh, rows),
    )
  logits = np.asarray(logits, np.float64)[0, :, : tokenizer.vocab_size]
  total, greedy = 0.0, True
  for place in range(start, len(whole)):
    row = logits[place - 1]
    total += row[whole[place]] - np.log(np.exp(row - row.max()).sum())
    total -= row.max()
    greedy &= int(row.argmax()) == whole[place]
  return total, greedy, len(whole) - start


@pytest.mark.parametrize('attention', ['bbcc', 'bbbc'])
def test_scores_are_sums_of_log_probabilities(model_of, attention):
  model = model_of(attention=attention)
  scores = model.score(PROMPTS, CONTINUATIONS)
  for prompt, text, score in zip(PROMPTS, CONTINUATIONS, scores, strict=True):
    total, greedy, tokens = define(model, prompt, text)
    assert score.tokens == tokens > 0
    assert abs(score.log_likelihood - total) < TOLERANCE
    assert score.greedy == greedy


def test_what_is_generated_is_greedy_and_no_other(model_of):
  model = model_of()
  prompts = [
    model.encode_prompt(prompt, Sampling(max_new_tokens=5))
    for prompt in PROMPTS[3:6]
  ]
  for prompt, done in zip(prompts, model.complete(prompts), strict=True):
    ids = np.append(prompt.ids, done.ids).astype(np.int32)
    other = ids.copy()
    other[-1] = (ids[-1] + 1) % model.tokenizer.vocab_size
    marks = np.append(prompt.in_instruction, np.zeros(len(done.ids), bool))
    best, worse = model.score_tokens(
      [Candidate(x, len(prompt.ids), marks) for x in (ids, other)]
    )
    assert best.greedy and not worse.greedy
    assert best.log_likelihood > worse.log_likelihood


# A row a call on one device, and all of them on a mesh.
@pytest.mark.parametrize(
  ('sizes', 'call_tokens'), [((1, 1, 1), 1), ((2, 2, 2), 2**14)]
)
def test_mesh_packing_and_chunks_do_not_change_scores(
  model_of, monkeypatch, sizes, call_tokens
):
  whole = model_of().score(PROMPTS, CONTINUATIONS)
  monkeypatch.setattr(scoring, 'LOGIT_TOKENS', 8)
  model = model_of(*sizes)
  seen = {}
  candidates = [
    model._encode_candidate(*pair)
    for pair in zip(PROMPTS, CONTINUATIONS, strict=True)
  ]
  scores = model.score_tokens(
    candidates, seen.__setitem__, call_tokens=call_tokens
  )
  assert seen == dict(enumerate(scores))
  for one, other in zip(whole, scores, strict=True):
    assert one[1:] == other[1:]
    assert abs(one.log_likelihood - other.log_likelihood) < TOLERANCE


def test_continuations_of_one_token_share_what_is_read(model_of, monkeypatch):
  model = model_of()
  sizes = []
  real = scoring.pack

  def watch(lengths, *rest):
    sizes.append(len(lengths))
    return real(lengths, *rest)

  monkeypatch.setattr(scoring, 'pack', watch)
  texts = ['f', 'p', 'i', 'i']
  together = model.score('a line\n', texts)
  assert sizes == [1]
  assert {score.tokens for score in together} == {1}
  for text, score in zip(texts, together, strict=True):
    assert abs(model.score('a line\n', text)[0] - score[0]) < TOLERANCE
  assert len({score.log_likelihood for score in together}) == 3


def test_one_prompt_or_one_continuation_serves_all(model_of):
  model = model_of()
  pairs = model.score([PROMPTS[0], PROMPTS[3]], ['yes', 'yes'])
  assert model.score([PROMPTS[0], PROMPTS[3]], 'yes') == pairs
  (first,) = model.score(PROMPTS[0], ['yes'])
  assert model.score(PROMPTS[0], 'yes') == first
  assert first == pytest.approx(pairs[0], abs=TOLERANCE)
  with pytest.raises(ValueError, match='2 prompts and 3 continuations'):
    model.score([PROMPTS[0]] * 2, ['yes'] * 3)


def test_what_cannot_be_scored_is_refused(model_of, tokenizer):
  model = model_of()
  with pytest.raises(ValueError, match="continuation '' has no tokens"):
    model.score('a', '')
  with pytest.raises(ValueError, match='more than the 600 positions'):
    model.score('a', 'b ' * 900)
  with pytest.raises(TypeError, match='a continuation is of type int'):
    model.score('a', [3])
  with pytest.raises(ValueError, match='no tokens of its own'):
    encode_candidate(tokenizer, [''], 'b')
