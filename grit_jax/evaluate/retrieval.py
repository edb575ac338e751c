"""Retrieval: each query has one right candidate; how high does it rank?

Everything is NumPy on the host: exact, and alike on every accelerator. The
letters: Q queries, C candidates, D model.
"""

import re
from collections.abc import Sequence

import numpy as np

# Scores that exist at one time, in float32: 256 MiB.
MAX_SCORES = 2**26
# Candidates that are held in float64 at one time: 128 MiB at D = 4096.
CANDIDATE_BLOCK = 4096

# Where an identifier in camel case falls into words: parse|Http, HTTP|Server.
HUMP = re.compile(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])')
# A run of letters, or a run of digits; an underscore parts words too.
WORD = re.compile(r'[^\W\d_]+|\d+')


def rank_of_positive(
  queries: np.ndarray, candidates: np.ndarray, positives: np.ndarray
) -> np.ndarray:
  """Ranks each query's right candidate by inner product, the best at 0.

  A tie ranks ahead of the right candidate, and so does a score that is not a
  number: embeddings that have collapsed to one point, or that are NaN, come
  last instead of first.

  Args:
    queries: floating [Q, D].
    candidates: floating [C, D].
    positives: int [Q], the index of each query's right candidate.

  Returns:
    int64 [Q]: how many other candidates rank ahead of the right one.
  """
  positives = _check_positives(positives, len(queries), len(candidates))
  ranks = np.empty(len(queries), np.int64)
  for block in _query_blocks(len(queries), len(candidates)):
    scores = _inner_products(queries[block], candidates)
    ranks[block] = _rank(scores, positives[block])
  return ranks


def retrieval_metrics(ranks: np.ndarray) -> dict[str, float]:
  """The usual metrics of 0-based ranks of one right candidate a query.

  With one right candidate the ideal gain is 1, so a query's nDCG@10 is
  1 / log2(rank + 2) within the first ten, and 0 below.
  """
  ranks = np.asarray(ranks)
  if not ranks.size:
    raise ValueError('there are no ranks to summarise')
  gains = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)
  return {
    'recall_at_1': float(np.mean(ranks < 1)),
    'recall_at_10': float(np.mean(ranks < 10)),
    'ndcg_at_10': float(np.mean(gains)),
  }


def random_metrics(candidates: int) -> dict[str, float]:
  """What a uniformly random ranking of so many candidates has on average.

  Every rank is as likely as any other, so the expectation is exactly the mean
  over each rank taken once.
  """
  return retrieval_metrics(np.arange(candidates))


def tfidf_metrics(
  query_texts: Sequence[str],
  candidate_texts: Sequence[str],
  positives: np.ndarray,
) -> dict[str, float]:
  """The metrics of a strong lexical baseline: cosine of TF-IDF vectors.

  Identifiers are split into their words, so `parse_http`, `parseHttp` and
  "parse HTTP" match. The vocabulary and the frequencies are those of the
  candidates alone: what a search engine knows before it sees a query.

  Args:
    query_texts: Q texts.
    candidate_texts: C texts.
    positives: int [Q], the index of each query's right candidate.

  Returns:
    The same metrics as `retrieval_metrics`; none if no candidate has a word.
  """
  if not any(map(split_words, candidate_texts)):
    return {}
  # Here, because it takes a second that other starts of a run need not wait.
  from sklearn.feature_extraction.text import TfidfVectorizer

  positives = _check_positives(
    positives, len(query_texts), len(candidate_texts)
  )
  vectorizer = TfidfVectorizer(analyzer=split_words, sublinear_tf=True)
  candidates = vectorizer.fit_transform(candidate_texts).T.tocsr()
  queries = vectorizer.transform(query_texts)
  ranks = np.empty(len(positives), np.int64)
  for block in _query_blocks(len(positives), len(candidate_texts)):
    scores = (queries[block] @ candidates).toarray().astype(np.float32)
    ranks[block] = _rank(scores, positives[block])
  return retrieval_metrics(ranks)


def split_words(text: str) -> list[str]:
  """The lower-case words of a text or of code, identifiers taken apart.

  For example, `parse_HTTPHeader2` gives parse, http, header, 2.
  """
  return [word.lower() for word in WORD.findall(HUMP.sub(' ', text))]


def top_candidates(
  query: np.ndarray, candidates: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the candidates with the largest inner products.

  Args:
    query: floating [D].
    candidates: floating [C, D].
    k: how many; all of them where there are fewer.

  Returns:
    Their indices, int [k], the best first and ties in order of the index, and
    their scores, float32 [k].
  """
  if k < 1:
    raise ValueError(f'k is {k}; it must be 1 or more')
  scores = _inner_products(query[None], candidates)[0]
  best = np.argsort(-scores, kind='stable')[:k]
  return best, scores[best]


def _check_positives(
  positives: np.ndarray, queries: int, candidates: int
) -> np.ndarray:
  positives = np.asarray(positives)
  if positives.shape != (queries,):
    raise ValueError(
      f'positives has the shape {positives.shape} for {queries} queries'
    )
  # NumPy would take -1 for the last candidate.
  if np.any((positives < 0) | (positives >= candidates)):
    raise ValueError(f'positives has an index outside of 0 to {candidates - 1}')
  return positives


def _query_blocks(queries: int, candidates: int) -> list[slice]:
  """Slices of the queries, each with `MAX_SCORES` scores at most."""
  size = max(1, MAX_SCORES // max(1, candidates))
  return [slice(start, start + size) for start in range(0, queries, size)]


def _inner_products(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
  """Inner products in float32 [Q, C], summed in float64.

  The order of a sum differs within one matrix product. In float32 that parts
  equal candidates in the last digit, and a tie would be decided by chance;
  float64 rounded to float32 leaves them equal.
  """
  queries = np.asarray(queries, np.float64)
  scores = np.empty((len(queries), len(candidates)), np.float32)
  for start in range(0, len(candidates), CANDIDATE_BLOCK):
    block = slice(start, start + CANDIDATE_BLOCK)
    scores[:, block] = queries @ np.asarray(candidates[block], np.float64).T
  return scores


def _rank(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
  """The rank [Q] of each positive in its row of scores [Q, C]."""
  positive_scores = np.take_along_axis(scores, positives[:, None], axis=1)
  # `not <` rather than `>=`: it holds for NaN. It holds for the positive
  # itself too, which is the 1.
  return np.sum(~(scores < positive_scores), axis=1) - 1
