"""The instructions of MTEB's tasks, as the paper has them.

They are those of E5-Mistral (arXiv 2401.00368), which mteb keeps in
its tasks' metadata for all but the ones below: its classes of tasks have a
sentence for each of the others, and for a task that the paper does not have.
"""

_CQADUPSTACK = (
  'Given a question, retrieve detailed question descriptions from '
  'Stackexchange that are duplicates to the given question'
)

# What mteb does not know, or has otherwise, by the names of its tasks.
INSTRUCTIONS = {
  **{
    f'CQADupstack{forum}Retrieval': _CQADUPSTACK
    for forum in (
      '',
      'Android',
      'English',
      'Gaming',
      'Gis',
      'Mathematica',
      'Physics',
      'Programmers',
      'Stats',
      'Tex',
      'Unix',
      'Webmasters',
      'Wordpress',
    )
  },
  'SummEval': (
    'Given a news summary, retrieve other semantically similar summaries'
  ),
}
