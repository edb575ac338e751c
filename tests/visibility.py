"""Which token sees which: the definition of the attention modes.

Token by token and pair by pair, for tests of what computes it otherwise.
"""

import numpy as np

from grit_jax.batch import Rows
from grit_jax.models.attention import Kind

# The letters of instruction and text: b(idirectional) or c(ausal).
LETTERS = {
  Kind.BIDIRECTIONAL: 'bb',
  Kind.CAUSAL: 'cc',
  Kind.INSTRUCTION: 'bc',
  Kind.TEXT: 'cb',
}


def sees(rows: Rows, row: int, t: int, s: int, kind: Kind, window: int) -> bool:
  """Whether token t sees token s; padding, segment 0, sees nothing."""
  segments, instruction = rows.segments[row], rows.in_instruction[row]
  if segments[t] == 0 or segments[t] != segments[s]:
    return False
  if window and abs(t - s) >= window + (kind is Kind.BIDIRECTIONAL):
    return False
  if s <= t or kind is Kind.BIDIRECTIONAL:
    return True
  stretch = instruction[t : s + 1]
  letter = LETTERS[kind][0 if instruction[t] else 1]
  return letter == 'b' and bool(np.all(stretch == instruction[t]))


def seen_by(
  rows: Rows, row: int, t: int, kind: Kind, window: int
) -> np.ndarray:
  """What token t sees, bool [T]."""
  tokens = range(rows.segments.shape[1])
  return np.array([sees(rows, row, t, s, kind, window) for s in tokens])
