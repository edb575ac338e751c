"""Records whose texts are as long as those of the recipe, or all one length."""

import json
import pathlib

import numpy as np

# Batches of an epoch and mean tokens of a passage: the paper's mixture has such
# sets (MS MARCO, Natural Questions, NLI, question answering, synthetic queries,
# documents), and a batch is of one of them.
MIX = {
  'passages': (5, 80),
  'questions': (4, 134),
  'sentences': (4, 22),
  'answers': (3, 221),
  'synthetic': (2, 490),
  'documents': (2, 860),
}
EPOCH = sum(batches for batches, _ in MIX.values())
CONVERSATION_TOKENS = 560
# Of the lognormal lengths.
SPREAD = 0.6
# A query has 34 to 64 tokens with its instruction and the format.
INSTRUCTION = 'find the text that answers'
QUERY_WORDS = (12, 42)
# A word is a piece of the tokenizer, and these are what the format adds.
FORMAT_TOKENS = {'passage': 8, 'conversation': 20}
# Words for each piece of the tokenizer: it then has them whole, but for rare
# ones.
WORDS_A_PIECE = 0.25


class Writer:
  """Draws words, and writes records of them."""

  def __init__(self, folder: pathlib.Path, max_tokens: int, pieces: int):
    """Makes up the words.

    Args:
      folder: of the files.
      max_tokens: more of a text would only be cut off.
      pieces: of the tokenizer.
    """
    folder.mkdir(parents=True)
    self.folder, self.max_tokens = folder, max_tokens
    self.rng = np.random.default_rng(0)
    letters = np.array(list('abcdefghijklmnopqrstuvwxyz'))
    self.words = [
      ''.join(self.rng.choice(letters, self.rng.integers(2, 8)))
      for _ in range(int(WORDS_A_PIECE * pieces))
    ]

  def text(self, tokens: float) -> str:
    """Returns a text of about so many tokens, of at least one."""
    count = max(1, int(min(tokens, self.max_tokens)))
    return ' '.join(self.rng.choice(self.words, count))

  def length(self, mean: float) -> float:
    """Draws a lognormal length of this mean."""
    median = mean / np.exp(SPREAD**2 / 2)
    return median * np.exp(SPREAD * self.rng.standard_normal())

  def pairs(self, name: str, count: int, mean: float | None) -> None:
    """Writes queries with a positive and a hard negative each.

    Args:
      name: of the file.
      count: of the records.
      mean: tokens of a passage; None: all texts are cut at `max_tokens`.
    """
    with open(self.folder / f'{name}.jsonl', 'w') as file:
      for _ in range(count):
        query, *passages = [self.max_tokens] * 3
        if mean:
          query = self.rng.integers(*QUERY_WORDS)
          passages = [
            self.length(mean) - FORMAT_TOKENS['passage'] for _ in passages
          ]
        positive, negative = ([['', self.text(n)]] for n in passages)
        record = {
          'query': [INSTRUCTION, self.text(query)],
          'pos': positive,
          'neg': negative,
        }
        file.write(json.dumps(record) + '\n')

  def conversations(self, count: int, mean: float | None) -> None:
    """Writes questions with answers thrice as long; `mean` as in `pairs`."""
    with open(self.folder / 'conversations.jsonl', 'w') as file:
      for _ in range(count):
        question, answer = self.max_tokens / 2, self.max_tokens
        if mean:
          tokens = self.length(mean) - FORMAT_TOKENS['conversation']
          question, answer = tokens / 4, 3 * tokens / 4
        turns = [self.text(question), self.text(answer)]
        file.write(json.dumps({'text': turns}) + '\n')


def write_corpus(
  folder: pathlib.Path,
  workload: str,
  pairs: int,
  conversations: int,
  max_tokens: int,
  pieces: int,
) -> None:
  """Writes an epoch.

  Args:
    folder: for the files; it must not exist.
    workload: `mix`, or `equal`: all texts are cut at the same length.
    pairs: a batch.
    conversations: a batch.
    max_tokens: of a text.
    pieces: of the tokenizer.
  """
  writer = Writer(folder, max_tokens, pieces)
  if workload == 'equal':
    writer.pairs('texts', EPOCH * pairs, None)
    writer.conversations(EPOCH * conversations, None)
    return
  for name, (batches, mean) in MIX.items():
    writer.pairs(name, batches * pairs, mean)
  writer.conversations(EPOCH * conversations, CONVERSATION_TOKENS)
