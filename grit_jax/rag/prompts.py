r"""The modes of retrieval-augmented generation, and their prompts.

They are those of arXiv 2402.09906, section 4. What is encoded for retrieval
leaves a KV cache, and generation goes on from it instead of reading the same
text again:

    query caching      <s><|embed|>\n{query}        + the prompt
    doc caching        <s><|embed|>\n{document}     + the prompt
    query-doc caching  <s><|embed|>\n{query}    + \n<|embed|>\n{document}  + ...
    doc-query caching  <s><|embed|>\n{document} + <s><|embed|>\n{query}    + ...

In the last two the texts were encoded apart and have not seen each other.
"""

import enum
from collections.abc import Mapping, Sequence

from grit_jax.data.formats import ASSISTANT, EMBED, USER
from grit_jax.inference.gritlm import join_title

# What a document is encoded after where it stands behind a query's cache.
BEHIND_QUERY = f'\n{EMBED}'

_QUERY_BEFORE = (
  'Optionally using the prior context answer the query prior to it'
)
_QUERY_LAST = (
  'Answer the prior query while optionally using the context prior to it'
)


class Mode(enum.Enum):
  """How a question is answered; the values are what a user types."""

  NO_RETRIEVAL = 'no-retrieval'
  QUERY_FIRST = 'query-first'
  DOCUMENT_FIRST = 'document-first'
  QUERY = 'query-caching'
  DOC = 'doc-caching'
  QUERY_DOC = 'query-doc-caching'
  DOC_QUERY = 'doc-query-caching'

  @property
  def caches_query(self) -> bool:
    """Whether generation goes on from the query's cache."""
    return self in (Mode.QUERY, Mode.QUERY_DOC, Mode.DOC_QUERY)

  @property
  def caches_document(self) -> bool:
    """Whether generation goes on from a document's cache."""
    return self in (Mode.DOC, Mode.QUERY_DOC, Mode.DOC_QUERY)


def format_prompt(
  mode: Mode,
  query: str,
  documents: Sequence[str | Mapping[str, str]],
  answer_start: str = '',
) -> str:
  """Formats what is generated from, after the caches if the mode has any.

  Args:
    mode: How the question is answered.
    query: The question.
    documents: What was retrieved, the best first; each goes into the prompt
      with its title, unless its cache stands for it.
    answer_start: What every answer begins with; the paper's evaluation has
      `The answer is`.
  """
  context = '\n\n'.join(join_title(document) for document in documents)
  match mode:
    case Mode.NO_RETRIEVAL:
      user = query
    case Mode.QUERY_FIRST:
      user = f'{query}\n\n{context}\n\n{_QUERY_BEFORE}'
    case Mode.DOCUMENT_FIRST:
      user = f'{context}\n\n{query}\n\n{_QUERY_LAST}'
    case Mode.QUERY:
      user = f'{context}\n\n{_QUERY_BEFORE}'
    case Mode.DOC:
      user = f'{query}\n\n{_QUERY_LAST}'
    case Mode.QUERY_DOC:
      user = _QUERY_BEFORE
    case Mode.DOC_QUERY:
      user = _QUERY_LAST
  behind_cache = '\n' if mode.caches_query or mode.caches_document else ''
  return f'{behind_cache}{USER}{user}\n{ASSISTANT}{answer_start}'
