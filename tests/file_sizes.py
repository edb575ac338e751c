"""A disk that refuses files beyond a size, for tests of what that leaves."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def limit_file_sizes(count: int) -> Iterator[None]:
  """Lets this process write no file of more than `count` bytes meanwhile."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
