"""Which passages a query comes with, and which ones it is compared with."""

import numpy as np


def draw_subsets(
  rng: np.random.Generator, sizes: np.ndarray, count: int
) -> np.ndarray:
  """Draws `count` different numbers below each size, every set as likely.

  Floyd's algorithm (Bentley and Floyd 1987), for all sizes at once.

  Args:
    rng: for the draws.
    sizes: int [N], each `count` or more.
    count: numbers a size.

  Returns:
    int64 [N, count].
  """
  chosen = np.empty((len(sizes), count), np.int64)
  for i in range(count):
    last = sizes - count + i
    drawn = rng.integers(last + 1)
    repeated = (chosen[:, :i] == drawn[:, None]).any(axis=1)
    chosen[:, i] = np.where(repeated, last, drawn)
  return chosen


def choose_passages(
  rng: np.random.Generator,
  positives: np.ndarray,
  negatives: np.ndarray,
  num_passages: int,
  hard_negatives: str,
) -> np.ndarray:
  """Chooses the texts of each record that a step takes.

  Args:
    rng: for the draws.
    positives: int [Q], positives of each record.
    negatives: int [Q], its hard negatives, `num_passages - 1` or more.
    num_passages: one positive, drawn, and the others negatives.
    hard_negatives: `config.DataConfig.hard_negatives`.

  Returns:
    int64 [Q, 1 + G], places in the record's texts: the query, the positive,
    the negatives.
  """
  texts = np.zeros((len(positives), 1 + num_passages), np.int64)
  texts[:, 1] = 1 + rng.integers(positives)
  if hard_negatives == 'fixed':
    chosen = np.arange(num_passages - 1)
  else:
    chosen = draw_subsets(rng, negatives, num_passages - 1)
  texts[:, 2:] = 1 + positives[:, None] + chosen
  return texts


def compare(
  queries: np.ndarray,
  passages: np.ndarray,
  owners: np.ndarray,
  positives: np.ndarray,
  negatives: str,
  mask_known: bool,
) -> np.ndarray:
  """Decides which passages of the batch each query is compared with.

  With `mask_known` a passage that has the text of a known positive of the query
  is no negative of it. Known are the positives of its own record, and those of
  the batch's records whose query has the same text.

  Args:
    queries: uint64 [Q], hashes of the queries' texts.
    passages: uint64 [Q, G], of the passages', the positive first.
    owners: int [K], the queries that `positives` are known of.
    positives: uint64 [K], hashes of all positives of all records.
    negatives: `config.DataConfig.negatives`.
    mask_known: `config.DataConfig.mask_known_positives`.

  Returns:
    bool [Q, Q * G]. A query's own positive is always in it.
  """
  count, group = passages.shape
  numbers = np.arange(count)
  if mask_known:
    scored = _find_unknown(queries, passages, owners, positives)
  else:
    scored = np.ones((count, count * group), bool)
  by_query = scored.reshape(count, count, group)
  by_query[numbers, numbers, 0] = True
  if negatives == 'hard':
    own = by_query[numbers, numbers]
    by_query[:] = False
    by_query[numbers, numbers] = own
  return scored


def _find_unknown(
  queries: np.ndarray,
  passages: np.ndarray,
  owners: np.ndarray,
  positives: np.ndarray,
) -> np.ndarray:
  """Returns which passages are no known positive of a query."""
  texts, passage = np.unique(passages.reshape(-1), return_inverse=True)
  same, query = np.unique(queries, return_inverse=True)
  place = np.searchsorted(texts, positives)
  place[place == len(texts)] = 0  # beyond all, so equal to none
  present = texts[place] == positives
  may_compare = np.ones((len(same), len(texts)), bool)
  may_compare[query[owners[present]], place[present]] = False
  # Many times as fast as one indexing by both.
  return np.take(np.take(may_compare, query, axis=0), passage, axis=1)
