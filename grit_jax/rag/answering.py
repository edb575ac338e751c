"""Questions are answered from what an index finds for them."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from grit_jax.errors import UserError
from grit_jax.inference.cache import KVCache
from grit_jax.inference.encoding import Options
from grit_jax.inference.generation import Completion
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.index import Index
from grit_jax.inference.sampling import Sampling
from grit_jax.inference.shards import Document
from grit_jax.rag.caches import DiskCaches, HostCaches
from grit_jax.rag.prompts import BEHIND_QUERY, Mode, format_prompt


@dataclasses.dataclass(frozen=True)
class Source:
  """A document that was found for a question.

  Attributes:
    number: Its number in the index.
    score: Inner product of its embedding and the question's.
    document: With `id`, `text` and perhaps `title`.
  """

  number: int
  score: float
  document: Document


@dataclasses.dataclass(frozen=True)
class Answer:
  """What is generated for a question.

  Attributes:
    question: The question.
    text: The answer.
    sources: The documents that the prompt or the cache has, the best first.
    completion: What was generated, with its tokens.
  """

  question: str
  text: str
  sources: tuple[Source, ...]
  completion: Completion


class Answerer:
  """Answers questions over an index in one mode."""

  def __init__(
    self,
    model: GritLM,
    index: Index | None,
    mode: Mode,
    caches: DiskCaches | HostCaches | None = None,
    *,
    documents: int = 1,
    instruction: str = '',
    answer_start: str = '',
  ):
    """Takes what it answers with.

    Args:
      model: Embeds questions, and generates.
      index: Of documents that the same model has embedded; None without
        retrieval.
      mode: How to answer.
      caches: The documents' caches, in modes that go on from them.
      documents: How many to answer from; 1 where their caches are gone on from.
      instruction: What the question is embedded with.
      answer_start: See `format_prompt`.

    Raises:
      UserError: The mode does not go with the rest.
    """
    if mode.caches_document and documents != 1:
      raise UserError(
        f'mode={mode.value} answers from the cache of 1 document, not '
        f'{documents}: caches of several have not seen each other.'
      )
    if mode.caches_document and caches is None:
      raise UserError(f'mode={mode.value} needs caches of the documents.')
    if mode is not Mode.NO_RETRIEVAL and index is None:
      raise UserError(f'mode={mode.value} needs an index.')
    self.model, self.mode, self.documents = model, mode, documents
    self.index = None if mode is Mode.NO_RETRIEVAL else index
    self.caches = caches if mode.caches_document else None
    self.instruction, self.answer_start = instruction, answer_start

  def answer(
    self,
    questions: Sequence[str],
    sampling: Sampling = Sampling(),  # noqa: B008 - it is frozen
  ) -> list[Answer]:
    """Answers questions.

    Args:
      questions: Texts that are not blank.
      sampling: How to generate; each question's seed is one more than that of
        the question before it.

    Raises:
      UserError: A question is blank, or with what it is answered from is
        longer than the model's positions.
    """
    for number, question in enumerate(questions, 1):
      if not question.strip():
        raise UserError(f'Question {number} of {len(questions)} is blank.')
    found, query_caches = self._retrieve(questions)
    prompts = []
    for i, (question, sources, cache) in enumerate(
      zip(questions, found, query_caches, strict=True)
    ):
      text = format_prompt(
        self.mode, question, [s.document for s in sources], self.answer_start
      )
      seed = (sampling.seed + i) % 2**32
      settings = dataclasses.replace(sampling, seed=seed)
      cache = self._join(sources, cache)
      prompts.append(self.model.encode_prompt(text, settings, cache))
    return [
      Answer(question, self.answer_start + one.text, tuple(sources), one)
      for question, sources, one in zip(
        questions, found, self.model.complete(prompts), strict=True
      )
    ]

  def _retrieve(
    self, questions: Sequence[str]
  ) -> tuple[list[list[Source]], Sequence[KVCache | None]]:
    """Returns what is found for each question, and the questions' caches."""
    caches: Sequence[KVCache | None] = [None] * len(questions)
    if self.index is None:
      return [[] for _ in questions], caches
    options: Options = {
      'instruction': self.instruction,
      'max_length': self.model.config.model.max_positions,
      'batch_size': 1,
    }
    encode = self.model.encode_queries
    if self.mode.caches_query:
      embeddings, caches = encode(questions, get_cache=True, **options)
    else:
      embeddings = encode(questions, **options)
    with jax.set_mesh(self.model.mesh):
      scores, numbers = self.index.search(embeddings, self.documents)
    return [
      [
        Source(int(number), float(score), document)
        for number, score, document in zip(
          row, row_scores, self.index.documents(row), strict=True
        )
      ]
      for row, row_scores in zip(numbers, scores, strict=True)
    ], caches

  def _join(
    self, sources: Sequence[Source], query: KVCache | None
  ) -> KVCache | None:
    """Returns the cache that an answer goes on from."""
    if self.caches is None:
      return query
    document = self.caches.read(sources[0].number)
    if query is None:
      return document
    query = query.astype(document.keys.dtype.name)
    if self.mode is Mode.QUERY_DOC:
      return KVCache.join([query, document])
    return KVCache.join([document, query])


def encode_documents(
  model: GritLM,
  documents: Sequence[Document],
  mode: Mode,
  max_length: int,
  batch_size: int = 1,
) -> tuple[np.ndarray, list[KVCache]]:
  """Embeds documents as a mode's caches have them.

  Args:
    model: The model.
    documents: With `text` and perhaps `title`.
    mode: The mode; in query-doc caching they go on from a query's cache, and so
      have no BOS.
    max_length: Tokens that are kept of each.
    batch_size: See `GritLM.encode`.

  Returns:
    The embeddings, [N, D], and the caches.
  """
  behind = mode is Mode.QUERY_DOC
  return model.encode_corpus(
    documents,
    instruction=BEHIND_QUERY if behind else '',
    add_special_tokens=not behind,
    max_length=max_length,
    batch_size=batch_size,
    get_cache=True,
  )
