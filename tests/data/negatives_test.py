"""Tests of grit_jax/data/negatives.py against plain loops."""

import itertools
from collections import Counter

import numpy as np
import pytest

from grit_jax.data.negatives import choose_passages, compare, draw_subsets

DRAWS = 20_000


def assert_uniform(counts: Counter, outcomes: int, draws: int) -> None:
  """All outcomes came, none more often than chance has it."""
  share = 1 / outcomes
  deviation = (draws * share * (1 - share)) ** 0.5
  assert len(counts) == outcomes
  # Five standard deviations of a binomial.
  assert max(abs(n - draws * share) for n in counts.values()) < 5 * deviation


@pytest.mark.parametrize(('size', 'count'), [(3, 1), (5, 2), (5, 4), (4, 4)])
def test_every_subset_is_drawn_as_often(size, count):
  # Beside sizes that are not looked at, which must not matter.
  sizes = np.tile([size, 9], DRAWS)
  drawn = draw_subsets(np.random.default_rng(0), sizes, count)
  subsets = Counter(tuple(sorted(x)) for x in drawn[::2].tolist())
  expected = set(itertools.combinations(range(size), count))
  assert set(subsets) == expected
  if len(expected) > 1:
    assert_uniform(subsets, len(expected), DRAWS)


def test_sizes_of_every_kind_are_drawn_from_at_once():
  sizes = np.random.default_rng(1).integers(6, 400, 3000)
  drawn = draw_subsets(np.random.default_rng(0), sizes, 6)
  assert drawn.shape == (3000, 6)
  assert (drawn >= 0).all() and (drawn < sizes[:, None]).all()
  assert all(len(set(row)) == 6 for row in drawn.tolist())


def test_a_query_comes_with_a_positive_and_negatives_as_likely_each():
  positives, negatives = np.tile([3, 1], DRAWS), np.tile([4, 2], DRAWS)
  texts = choose_passages(
    np.random.default_rng(0), positives, negatives, 3, 'sampled'
  )
  assert (texts[:, 0] == 0).all()
  many, few = texts[::2, 1:].tolist(), texts[1::2, 1:].tolist()
  assert_uniform(Counter(row[0] for row in many), 3, DRAWS)
  assert_uniform(Counter(tuple(sorted(row[1:])) for row in many), 6, DRAWS)
  # The positive and the negatives are drawn apart.
  assert_uniform(Counter((row[0], *sorted(row[1:])) for row in many), 18, DRAWS)
  assert {(row[0], *sorted(row[1:])) for row in few} == {(1, 2, 3)}
  assert {x for row in many for x in row[1:]} == {4, 5, 6, 7}


def test_fixed_negatives_are_the_first_ones_and_the_positive_is_drawn():
  positives, negatives = np.tile([3, 1], DRAWS), np.tile([4, 2], DRAWS)
  texts = choose_passages(
    np.random.default_rng(0), positives, negatives, 3, 'fixed'
  )
  assert {tuple(row) for row in texts[::2, 2:].tolist()} == {(4, 5)}
  assert {tuple(row) for row in texts[1::2, 2:].tolist()} == {(2, 3)}
  assert_uniform(Counter(texts[::2, 1].tolist()), 3, DRAWS)


def compare_one_by_one(
  queries: list[str],
  passages: list[list[str]],
  positives: list[list[str]],
  negatives: str,
) -> np.ndarray:
  """The definition, a pair at a time."""
  count, group = len(queries), len(passages[0])
  scored = np.zeros((count, count * group), bool)
  for q, query in enumerate(queries):
    known = set()
    for other, texts in zip(queries, positives, strict=True):
      if other == query:
        known |= set(texts)
    for p in range(count):
      for g in range(group):
        own = p == q and g == 0
        right = passages[p][g] in known
        in_question = p == q or negatives != 'hard'
        scored[q, p * group + g] = own or (in_question and not right)
  return scored


@pytest.mark.parametrize('negatives', ['all', 'hard', 'in_batch'])
@pytest.mark.parametrize('seed', range(6))
def test_comparisons_are_those_of_the_definition(negatives, seed):
  rng = np.random.default_rng(seed)
  count, group = 24, 1 if negatives == 'in_batch' else 3
  vocabulary = rng.integers(2**64, size=40, dtype=np.uint64)

  def draw(number: int) -> list[int]:
    return rng.choice(40, number).tolist()

  # Few texts, so that there are false negatives of each kind.
  queries = draw(count)
  positives = [draw(rng.integers(1, 4)) for _ in range(count)]
  passages = [[int(rng.choice(texts)), *draw(group - 1)] for texts in positives]
  expected = compare_one_by_one(queries, passages, positives, negatives)
  found = compare(
    vocabulary[queries],
    vocabulary[passages],
    np.repeat(np.arange(count), [len(texts) for texts in positives]),
    vocabulary[[text for texts in positives for text in texts]],
    negatives,
    mask_known=True,
  )
  assert found.dtype == bool
  np.testing.assert_array_equal(found, expected)
  # All kinds of pairs are there.
  assert 0 < expected.sum() < expected.size
  masked = compare_one_by_one(queries, passages, [[]] * count, negatives)
  assert (masked & ~expected).any()


def test_each_kind_of_false_negative_is_masked():
  # Query 0 has positives a and b, and comes with a. Query 1 is the same text
  # with the positive c. Query 2 has a too. Hard negatives: query 0's is its
  # own second positive, query 1's is a text of its own, query 2's is c.
  a, b, c, other, third = (np.uint64(x) for x in (11, 22, 33, 44, 55))
  scored = compare(
    np.array([7, 7, 8], np.uint64),
    np.array([[a, b], [c, other], [a, third]]),
    np.array([0, 0, 1, 2]),
    np.array([a, b, c, a]),
    'all',
    mask_known=True,
  )
  expected = [
    # a, b, c, other, a, third
    [True, False, False, True, False, True],
    [False, False, True, True, False, True],
    [False, True, True, True, True, True],
  ]
  np.testing.assert_array_equal(scored, expected)
