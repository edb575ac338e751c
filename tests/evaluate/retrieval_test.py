"""Tests of the retrieval metrics."""

import math

import numpy as np
import pytest

from grit_jax.evaluate import retrieval
from grit_jax.evaluate.retrieval import (
  random_metrics,
  rank_of_positive,
  retrieval_metrics,
  split_words,
  tfidf_metrics,
  top_candidates,
)

# Both sides are means of the same float64 terms, added in another order.
ROUNDING = 1e-12


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks so small that several are needed, the last of them not full."""
  monkeypatch.setattr(retrieval, 'MAX_SCORES', 100)
  monkeypatch.setattr(retrieval, 'CANDIDATE_BLOCK', 7)


def rank_one_by_one(queries, candidates, positives) -> list[int]:
  """The definition, in exact integer arithmetic."""
  ranks = []
  for query, positive in zip(queries, positives, strict=True):
    scores = [
      sum(int(a) * int(b) for a, b in zip(query, candidate, strict=True))
      for candidate in candidates
    ]
    ahead = [score >= scores[positive] for score in scores]
    ranks.append(sum(ahead) - ahead[positive])
  return ranks


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_ranks_are_those_of_the_definition(rng, small_blocks, dtype):
  # Small integers: exact, and with many ties.
  queries = rng.integers(-2, 3, (23, 4)).astype(dtype)
  candidates = rng.integers(-2, 3, (37, 4)).astype(dtype)
  positives = rng.integers(0, 37, 23)
  ranks = rank_of_positive(queries, candidates, positives)
  assert ranks.tolist() == rank_one_by_one(queries, candidates, positives)
  assert np.issubdtype(ranks.dtype, np.integer)


def test_block_sizes_do_not_change_ranks(rng, monkeypatch):
  queries = rng.normal(size=(50, 16)).astype(np.float32)
  candidates = rng.normal(size=(60, 16)).astype(np.float32)
  positives = rng.integers(0, 60, 50)
  whole = rank_of_positive(queries, candidates, positives)
  for scores, block in [(1, 1), (61, 7), (360, 59)]:
    monkeypatch.setattr(retrieval, 'MAX_SCORES', scores)
    monkeypatch.setattr(retrieval, 'CANDIDATE_BLOCK', block)
    ranks = rank_of_positive(queries, candidates, positives)
    np.testing.assert_array_equal(ranks, whole)


def test_scores_of_a_block_stay_within_the_bound(monkeypatch, rng):
  monkeypatch.setattr(retrieval, 'MAX_SCORES', 100)
  sizes = []
  inner_products = retrieval._inner_products

  def record(queries, candidates):
    scores = inner_products(queries, candidates)
    sizes.append(scores.size)
    return scores

  monkeypatch.setattr(retrieval, '_inner_products', record)
  rank_of_positive(
    rng.normal(size=(23, 4)), rng.normal(size=(37, 4)), np.zeros(23, int)
  )
  assert sum(sizes) == 23 * 37 and max(sizes) <= 100


def test_equal_candidates_tie_wherever_they_stand(rng, monkeypatch):
  # A block of one candidate is multiplied by another kernel, and summed in
  # another order: in float32 its scores differ from those of its equals.
  monkeypatch.setattr(retrieval, 'CANDIDATE_BLOCK', 100)
  row = rng.normal(size=(1, 1000)).astype(np.float32)
  candidates = np.repeat(row, 101, axis=0)
  queries = rng.normal(size=(103, 1000)).astype(np.float32)
  ranks = rank_of_positive(queries, candidates, np.arange(103) % 101)
  assert (ranks == 100).all()


def test_collapsed_and_broken_embeddings_come_last():
  positives = np.arange(5)
  for value in (0.0, 1.0, np.nan):
    embeddings = np.full((5, 3), value, np.float32)
    ranks = rank_of_positive(embeddings, embeddings, positives)
    assert ranks.tolist() == [4] * 5


def test_a_broken_candidate_ranks_ahead():
  candidates = np.array([[1.0], [np.nan], [0.5]])
  assert rank_of_positive(np.ones((1, 1)), candidates, np.array([0])) == [1]


@pytest.mark.parametrize(
  'positives, message',
  [([0, -1], 'outside of 0 to 2'), ([3, 0], 'outside'), ([0], 'shape')],
)
def test_positives_that_are_no_candidates_are_refused(positives, message):
  with pytest.raises(ValueError, match=message):
    rank_of_positive(np.ones((2, 2)), np.ones((3, 2)), np.array(positives))
  with pytest.raises(ValueError, match=message):
    tfidf_metrics(['a', 'b'], ['a', 'b', 'c'], np.array(positives))


def test_metrics_agree_with_scikit_learn(rng):
  from sklearn.metrics import ndcg_score

  queries = rng.normal(size=(200, 3))
  candidates = rng.normal(size=(40, 3))
  positives = rng.integers(0, 40, 200)
  scores = (queries @ candidates.T).astype(np.float32)
  relevance = np.eye(40)[positives]
  metrics = retrieval_metrics(rank_of_positive(queries, candidates, positives))
  order = np.argsort(-scores, axis=1)
  expected = {
    'recall_at_1': np.mean(order[:, 0] == positives),
    'recall_at_10': np.mean((order[:, :10] == positives[:, None]).any(axis=1)),
    'ndcg_at_10': ndcg_score(relevance, scores, k=10),
  }
  assert metrics == pytest.approx(expected, abs=ROUNDING)


def test_metrics_of_known_ranks():
  assert retrieval_metrics(np.array([0, 2, 9, 10])) == pytest.approx(
    {
      'recall_at_1': 1 / 4,
      'recall_at_10': 3 / 4,
      'ndcg_at_10': (1 + 1 / 2 + 1 / math.log2(11)) / 4,
    },
    abs=ROUNDING,
  )


def test_metrics_are_plain_numbers():
  for metrics in (retrieval_metrics(np.array([3])), random_metrics(3)):
    assert all(type(value) is float for value in metrics.values())


def test_no_ranks_have_no_metrics():
  with pytest.raises(ValueError, match='no ranks'):
    retrieval_metrics(np.array([], int))


@pytest.mark.parametrize('count', [1, 9, 10, 11, 1000])
def test_random_metrics_are_the_expectation(count):
  shown = min(count, 10)
  gains = math.fsum(1 / math.log2(place + 1) for place in range(1, shown + 1))
  assert random_metrics(count) == pytest.approx(
    {
      'recall_at_1': 1 / count,
      'recall_at_10': shown / count,
      'ndcg_at_10': gains / count,
    },
    abs=ROUNDING,
  )


@pytest.mark.parametrize(
  'text, words',
  [
    ('snake_case_name', 'snake case name'),
    ('camelCase PascalCase', 'camel case pascal case'),
    ('parseHTTPHeader2', 'parse http header 2'),
    ('__init__(self, x1)', 'init self x 1'),
    ('MAX_SIZE = 0x1F', 'max size 0 x 1 f'),
    ('Élan, naïve café', 'élan naïve café'),
    ('-> \n', ''),
  ],
)
def test_identifiers_are_split_into_words(text, words):
  assert split_words(text) == words.split()


def rank_by_tfidf(queries, candidates, positives) -> list[int]:
  """Cosines of (1 + log tf) * (1 + log((1 + C) / (1 + df))), in words."""
  documents = [split_words(text) for text in candidates]
  vocabulary = set().union(*documents)
  idf = {}
  for word in vocabulary:
    frequency = sum(word in document for document in documents)
    idf[word] = 1 + math.log((1 + len(documents)) / (1 + frequency))

  def weigh(words):
    weights = {
      word: (1 + math.log(words.count(word))) * idf[word]
      for word in set(words) & vocabulary
    }
    norm = math.sqrt(sum(weight**2 for weight in weights.values()))
    return {word: weight / norm for word, weight in weights.items()}

  vectors = [weigh(document) for document in documents]
  ranks = []
  for query, positive in zip(queries, positives, strict=True):
    weights = weigh(split_words(query))
    scores = [
      np.float32(
        math.fsum(weights[word] * vector.get(word, 0) for word in weights)
      )
      for vector in vectors
    ]
    ahead = [score >= scores[positive] for score in scores]
    ranks.append(sum(ahead) - ahead[positive])
  return ranks


def test_tfidf_metrics_are_those_of_the_definition(rng, small_blocks):
  names = ['readFile', 'write_file', 'HTTPServer', 'parse', 'line2', 'x', 'of']
  candidates = [' '.join(rng.choice(names, 6)) for _ in range(37)]
  queries = [' '.join(rng.choice(names, 3)) + ' unseen' for _ in range(22)] + [
    'unseen words alone'
  ]
  positives = rng.integers(0, 37, 23)
  ranks = rank_by_tfidf(queries, candidates, positives)
  assert ranks[-1] == 36 and len(set(ranks)) > 10
  assert tfidf_metrics(queries, candidates, positives) == pytest.approx(
    retrieval_metrics(np.array(ranks)), abs=ROUNDING
  )


def test_tfidf_knows_the_candidates_alone():
  # Were the queries counted too, `rare` would be the more frequent word, and
  # the first query would find candidate 1.
  candidates = ['rare', 'usual', 'usual other', 'usual thing']
  queries = ['rare usual'] + ['rare'] * 20
  metrics = tfidf_metrics(queries, candidates, np.zeros(21, int))
  assert metrics['recall_at_1'] == 1


def test_top_candidates_are_the_best_first(rng, small_blocks):
  query = rng.normal(size=8)
  candidates = rng.normal(size=(30, 8))
  indices, scores = top_candidates(query, candidates, 5)
  everything = sorted(
    ((float(query @ row), i) for i, row in enumerate(candidates)), reverse=True
  )
  assert indices.tolist() == [i for _, i in everything[:5]]
  np.testing.assert_array_equal(
    scores, np.float32([score for score, _ in everything[:5]])
  )


def test_top_candidates_keep_the_order_of_ties():
  candidates = np.array([[1.0], [2.0]] * 20)
  indices, _ = top_candidates(np.ones(1), candidates, 25)
  assert indices.tolist() == [*range(1, 40, 2), *range(0, 10, 2)]


def test_top_candidates_are_at_most_all(rng):
  indices, scores = top_candidates(np.ones(2), rng.normal(size=(3, 2)), 10)
  assert len(indices) == len(scores) == 3
  with pytest.raises(ValueError, match='k is 0'):
    top_candidates(np.ones(2), np.ones((3, 2)), 0)


def test_tfidf_has_no_figures_where_no_candidate_has_a_word():
  assert tfidf_metrics(['a word'], ['?!', '...'], np.array([1])) == {}
