"""What a command logs."""

import logging as standard
import os
import warnings

from absl import logging

_PACKAGE = os.path.dirname(__file__)
# What these log of an error they raise too, where we wait for them.
_RAISING = ('orbax', 'asyncio')


def quiet_libraries() -> None:
  """Shows what the package logs, and of libraries what may need attention."""
  logging.get_absl_handler().addFilter(_is_shown)
  # What Orbax leaves behind when a disk is full says nothing to the user.
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited')


def _is_shown(record: standard.LogRecord) -> bool:
  if record.pathname.startswith(_PACKAGE):
    return True
  folders = record.pathname.split(os.sep)
  return record.levelno >= standard.WARNING and not {*folders} & {*_RAISING}
