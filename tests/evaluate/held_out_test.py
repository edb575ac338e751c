"""Tests of grit_jax/evaluate/held_out.py."""

import copy
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest

from grit_jax.batch import Rows
from grit_jax.config import Config, DataConfig, EvaluationConfig
from grit_jax.data.dataset import EmbeddingDataset, GenerativeDataset, prepare
from grit_jax.data.sources import TRAIN, sources
from grit_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.evaluate.held_out import HeldOutEvaluation
from grit_jax.models import presets
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Decoder

ROW, GENERATED = 64, 8
# float32 sums in another order: in other rows, on other devices, or in float64.
# Absolute for embeddings, which have length 1, and relative for losses.
TOLERANCE = 1e-5
WORDS = 'parse format argument option value help print action store'.split()


class Data(NamedTuple):
  """What is held out, and its tokenizer."""

  tokenizer: Tokenizer
  embedding: list[EmbeddingDataset]
  generative: list[GenerativeDataset]


class Run(NamedTuple):
  """An evaluation on a mesh and what it found."""

  mesh: jax.sharding.Mesh
  model: Decoder
  evaluation: HeldOutEvaluation
  embeddings: tuple[np.ndarray, np.ndarray]
  results: dict[str, float]
  answers: list[list[int]]


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Data:
  """Two data sets of records and one of talks; every third positive recurs."""
  folder = tmp_path_factory.mktemp('held_out')
  rng = np.random.default_rng(0)

  def words(most: int) -> str:
    return ' '.join(rng.choice(WORDS, rng.integers(2, most)))

  files: dict[str, list[dict]] = {
    'pairs': [
      {
        'query': ['find' if i % 2 else '', words(6)],
        'pos': [['', 'the same' if i % 3 == 0 else f'{i} {words(16)}']],
        'neg': [['', words(5)]],
      }
      for i in range(18)
    ],
    'more': [
      {'query': ['', words(6)], 'pos': [['', words(9)]], 'neg': [words(5)]}
      for _ in range(3)
    ],
    'talks': [
      {'text': [words(6) for _ in range(2 * (1 + i % 2))]} for i in range(14)
    ],
  }
  for name, found in files.items():
    lines = [json.dumps(record) + '\n' for record in found]
    (folder / f'{name}.jsonl').write_text(''.join(lines))
  texts = [' '.join(rng.permutation(WORDS)) for _ in range(50)]
  tokenizer = SentencePieceTokenizer(train_tokenizer(texts, 300))
  made = [
    prepare(
      source,
      TRAIN,
      tokenizer,
      folder / 'prepared',
      max_query_tokens=32,
      max_passage_tokens=ROW,
      max_generative_tokens=ROW,
      min_negatives=1,
      held_out_fraction=0.0,
    )
    for source in sources(str(folder))
  ]
  embedding = [one for one in made if isinstance(one, EmbeddingDataset)]
  return Data(tokenizer, embedding, [x for x in made if x not in embedding])


def make_config(data: Data, **evaluation) -> Config:
  return Config(
    model=dataclasses.replace(
      presets.tiny(), vocab_size=data.tokenizer.vocab_size
    ),
    data=DataConfig(row_length=ROW, max_segments=4),
    evaluation=EvaluationConfig(
      rows=8, generated_tokens=GENERATED, **evaluation
    ),
  )


def run_on(
  mesh: jax.sharding.Mesh, data: Data, random_decoder: Callable
) -> Run:
  config = make_config(data)
  with jax.set_mesh(mesh):
    model = random_decoder(mesh, config.model)
    evaluation = HeldOutEvaluation(config, mesh, *data)
    embeddings = evaluation._encode_all(model)
    prompts = [
      evaluation._first_exchange(text)[0]
      for text in evaluation.conversations[:3]
    ]
    answers = [
      list(evaluation._generate(model, prompt).ids) for prompt in prompts
    ]
    results = evaluation.evaluate(model)
  return Run(mesh, model, evaluation, embeddings, results, answers)


@pytest.fixture(scope='module')
def one(mesh_of, data, random_decoder) -> Run:
  return run_on(mesh_of(1, 1, 1), data, random_decoder)


@pytest.fixture(scope='module')
def eight(mesh_of, data, random_decoder) -> Run:
  return run_on(mesh_of(2, 2, 2), data, random_decoder)


@partial(jax.jit, static_argnums=2)
def compute_states(
  model: Decoder, rows: Rows, kind: Kind
) -> tuple[jax.Array, jax.Array]:
  [hidden] = model([rows], [kind])
  return hidden, model.logits(hidden, model.gather_head())


def states_of(run: Run, texts: list, kind: Kind) -> tuple[np.ndarray, ...]:
  """The hidden states and logits of texts, each alone in a row."""
  ids = np.zeros((len(texts), ROW), np.int32)
  for row, text in zip(ids, texts, strict=True):
    row[: len(text)] = text
  real = np.arange(ROW) < np.array([len(text) for text in texts])[:, None]
  positions = np.where(real, np.arange(ROW), 0).astype(np.int32)

  with jax.set_mesh(run.mesh):
    rows = Rows(ids, real.astype(np.int32), positions, np.zeros_like(real))
    return jax.tree.map(np.asarray, compute_states(run.model, rows, kind))


def test_a_packed_text_is_embedded_as_if_it_were_alone(one):
  texts = [*one.evaluation.queries, *one.evaluation.candidates]
  lengths = [len(text.ids) for text in texts]
  # They fill more rows than a call has, and lie several in a row.
  assert 8 * ROW < sum(lengths) < 0.7 * len(texts) * ROW
  hidden, _ = states_of(one, [text.ids for text in texts], Kind.BIDIRECTIONAL)
  found = np.concatenate(one.embeddings)
  assert found.dtype == np.float32
  for text, states, embedding in zip(texts, hidden, found, strict=True):
    kept = states[text.instruction_length : len(text.ids)].astype(np.float64)
    expected = kept.mean(axis=0)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(embedding, expected, atol=TOLERANCE)


def test_texts_of_a_collection_are_embedded_apart(one):
  found = one.embeddings[1]
  scores = found @ found.T - 2 * np.eye(len(found))
  assert scores.max() < 1 - 100 * TOLERANCE


def test_a_positive_that_recurs_is_one_candidate(one, data):
  evaluation = one.evaluation
  records = [
    texts
    for dataset in data.embedding
    for texts in dataset.read(range(len(dataset)))
  ]
  assert len(evaluation.queries) == len(records) == 21
  distinct = {text.ids.tobytes() for text in evaluation.candidates}
  assert len(distinct) == len(evaluation.candidates) == 21 - 5
  assert one.results['candidates'] == 16
  for texts, query, positive in zip(
    records, evaluation.queries, evaluation.positives, strict=True
  ):
    np.testing.assert_array_equal(query.ids, texts[0].ids)
    np.testing.assert_array_equal(
      evaluation.candidates[positive].ids, texts[1].ids
    )


def test_retrieval_metrics_are_those_of_the_embeddings(one):
  queries, candidates = (x.astype(np.float64) for x in one.embeddings)
  scores = queries @ candidates.T
  right = scores[np.arange(len(scores)), one.evaluation.positives]
  ranks = (scores > right[:, None]).sum(axis=1)
  assert one.results['recall_at_1'] == np.mean(ranks == 0)
  assert one.results['recall_at_10'] == np.mean(ranks < 10)
  assert 0 < one.results['recall_at_10'] < 1


def test_the_generative_loss_is_the_mean_over_the_answers_tokens(one):
  texts = one.evaluation.conversations
  vocab = one.model.config.vocab_size
  _, logits = states_of(one, [text.ids for text in texts], Kind.CAUSAL)
  losses = []
  for text, scores in zip(texts, logits[..., :vocab], strict=True):
    scores = scores.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    losses += [
      -scores[place - 1, text.ids[place]]
      for place in np.flatnonzero(text.in_loss)
    ]
  np.testing.assert_allclose(
    one.results['generative_loss'], np.mean(losses), rtol=TOLERANCE
  )


def continue_naively(run: Run, prompt: list[int], count: int) -> list[int]:
  """Greedy tokens, each from a forward pass over all before it."""
  tokens = list(prompt)
  vocab = run.model.config.vocab_size
  for _ in range(count):
    _, [logits] = states_of(run, [tokens], Kind.CAUSAL)
    tokens.append(int(logits[len(tokens) - 1, :vocab].argmax()))
  return tokens[len(prompt) :]


def prompt_of(run: Run, place: int) -> list[int]:
  return run.evaluation._first_exchange(run.evaluation.conversations[place])[0]


def test_the_continuation_is_the_greedy_one(one):
  expected = continue_naively(one, prompt_of(one, 0), GENERATED)
  assert len(set(expected)) > 1
  assert one.evaluation.tokenizer.eos not in expected
  assert one.answers[0] == expected


def test_the_continuation_stops_at_eos(one):
  [answer] = one.answers[:1]
  place = next(i for i in range(1, GENERATED) if answer[i] not in answer[:i])
  evaluation = copy.copy(one.evaluation)
  evaluation.tokenizer = copy.copy(evaluation.tokenizer)
  evaluation.tokenizer.eos = answer[place]
  with jax.set_mesh(one.mesh):
    found = evaluation._generate(one.model, prompt_of(one, 0))
  assert place + 1 < GENERATED
  assert list(found.ids) == answer[: place + 1]


def test_the_first_exchange_is_a_prompt_and_its_answer_alone(one):
  tokenizer = one.evaluation.tokenizer
  several = 0
  for text in one.evaluation.conversations:
    prompt, answer = one.evaluation._first_exchange(text)
    assert tokenizer.decode(prompt).count('<|assistant|>') == 1
    assert answer[-1] == tokenizer.eos and answer.count(tokenizer.eos) == 1
    joined = [*prompt, *answer]
    assert text.ids[: len(joined)].tolist() == joined
    several += len(joined) < len(text.ids)
  assert several


def test_eight_devices_find_what_one_finds(one, eight):
  for found, expected in zip(eight.embeddings, one.embeddings, strict=True):
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
  assert eight.answers == one.answers
  assert eight.results.keys() == one.results.keys()
  for name, expected in one.results.items():
    np.testing.assert_allclose(
      eight.results[name], expected, rtol=TOLERANCE, err_msg=name
    )


def test_the_baselines_are_of_the_same_queries_and_candidates(one):
  baselines = one.evaluation.baselines()
  assert baselines['random']['recall_at_1'] == 1 / 16
  # Records of `pairs` carry a number that no query has, so it is not perfect.
  assert 0 <= baselines['tfidf']['recall_at_1'] < 1


def test_examples_show_queries_and_an_answer(one):
  with jax.set_mesh(one.mesh):
    shown = one.evaluation.show_examples(one.model)
  assert shown.count('Query: ') == 3
  assert shown.count('best of 16') == 3
  prompt = prompt_of(one, 0)
  assert one.evaluation.tokenizer.decode(prompt).splitlines()[1] in shown
  assert 'true answer: ' in shown and 'generated: ' in shown


def test_a_sample_is_the_same_every_time_and_of_the_size_asked_for(one, data):
  config = make_config(data, max_queries=5, max_conversations=4)
  # The run's seed changes nothing of it, so runs can be compared.
  a, b = (
    HeldOutEvaluation(dataclasses.replace(config, seed=seed), one.mesh, *data)
    for seed in range(2)
  )
  assert len(a.queries) == 5 and len(a.conversations) == 4
  for x, y in zip(
    [*a.queries, *a.conversations], [*b.queries, *b.conversations], strict=True
  ):
    np.testing.assert_array_equal(x.ids, y.ids)


def test_a_sample_may_leave_a_data_set_out(one, data):
  config = make_config(data, max_queries=1)
  assert len(HeldOutEvaluation(config, one.mesh, *data).queries) == 1


@pytest.mark.parametrize('absent', ['embedding', 'generative'])
def test_a_stream_without_records_has_no_figures(one, data, absent):
  evaluation = HeldOutEvaluation(
    make_config(data), one.mesh, *data._replace(**{absent: []})
  )
  with jax.set_mesh(one.mesh):
    results = evaluation.evaluate(one.model)
  expected = {
    name: value
    for name, value in one.results.items()
    if (name == 'generative_loss') == (absent == 'embedding')
  }
  assert results == expected
