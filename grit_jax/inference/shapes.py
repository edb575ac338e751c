"""Sizes that programs are compiled for: few, so that calls share them."""


def round_up(count: int, least: int = 1) -> int:
  """Returns the power of two times `least` that `count` fits."""
  size = least
  while size < count:
    size *= 2
  return size
