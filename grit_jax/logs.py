"""What a command logs."""

import logging as standard
import os

from absl import logging

_PACKAGE = os.path.dirname(__file__)


def quiet_libraries(least: int | None = standard.WARNING) -> None:
  """Shows what the package logs, and little of the libraries underneath.

  Args:
    least: the level, of Python's `logging`, from which theirs is shown too:
      by default what may need the user's attention. None: nothing is.
  """
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.pathname.startswith(_PACKAGE)
      or (least is not None and record.levelno >= least)
    )
  )
