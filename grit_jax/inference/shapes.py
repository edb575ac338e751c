"""Sizes that programs are compiled for: few, so that calls share them."""


def round_up(count: int, least: int = 1) -> int:
  """Returns the power of two times `least` that `count` fits."""
  size = least
  while size < count:
    size *= 2
  return size


def round_rows(count: int, shards: int, most: int) -> int:
  """Returns the rows of a call that `count` rows fit, a multiple of `shards`.

  Args:
    count: rows in use, `most` at most.
    shards: what rows are split into.
    most: the rows of a full call, a multiple of `shards`.
  """
  return min(most, shards * round_up(-(-count // shards)))
