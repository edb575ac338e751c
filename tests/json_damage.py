"""Damages JSON files in every place: a reader names what is wrong."""

import copy
import json
import pathlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from grit_jax.errors import UserError


def check_every_damage_is_named(
  path: pathlib.Path, read: Callable[[], Any], unread: Collection[str] = ()
) -> None:
  """Checks that a reader raises a UserError that names the file.

  Args:
    path: The file, which is left as it was.
    read: Reads it.
    unread: Patterns of the keys, `a/b/0`, that nobody needs, and of those that
      may be missing, `a/b/0 gone`.
  """
  content = path.read_text()
  whole = json.loads(content)
  damages = {
    'empty': '', 'garbage': '{x', 'half': content[: len(content) // 2],
    'list': '[]', 'object': '{}', 'deep': '[' * 10**5, 'bytes': '\xff',
  }  # fmt: skip
  for place, key, damaged in _damage(whole, ''):
    if not any(
      re.fullmatch(pattern, name) for pattern in unread for name in (place, key)
    ):
      damages[key] = json.dumps(damaged)
  read()
  try:
    for name, damage in damages.items():
      path.write_text(damage, encoding='latin-1')
      try:
        read()
      except UserError as error:
        assert path.name in str(error), f'{name}: {error}'
      else:
        raise AssertionError(f'{path.name}: {name}: nobody complains')
  finally:
    path.write_text(content)


def _damage(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
  """Yields places, names, and copies with one value of another type or gone."""
  if not isinstance(value, dict | list):
    return
  for key in list(value) if isinstance(value, dict) else range(len(value)):
    inner = f'{place}/{key}'.lstrip('/')
    for name, other in ('null', None), ('text', 'oops'), ('number', -1.5):
      if type(value[key]) is not type(other):
        yield inner, f'{inner} {name}', _with(value, key, other)
    if isinstance(value, dict):
      gone = copy.copy(value)
      del gone[key]
      yield inner, f'{inner} gone', gone
    for deeper, name, changed in _damage(value[key], inner):
      yield deeper, name, _with(value, key, changed)


def _with(value: Any, key: Any, other: Any) -> Any:
  changed = copy.copy(value)
  changed[key] = other
  return changed
