"""GRIT in JAX: one language model that embeds and generates."""

import typing

if typing.TYPE_CHECKING:
  from grit_jax.inference.gritlm import GritLM

__all__ = ['GritLM']


def __getattr__(name: str) -> object:
  """Imports `GritLM` at its first use: preparing data needs no JAX."""
  if name == 'GritLM':
    from grit_jax.inference.gritlm import GritLM

    return GritLM
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
