"""The evaluation command names what is wrong with what it is asked."""

import sys

import pytest

import grit_jax.evaluate
from grit_jax.errors import UserError
from grit_jax.evaluate import __main__ as command


@pytest.mark.parametrize(
  'name, package, module',
  [('mteb', 'mteb', 'mteb_encoder'), ('lm', 'lm_eval', 'generative_tasks')],
)
def test_a_missing_runner_is_named_with_its_extra(
  monkeypatch, name, package, module
):
  monkeypatch.setitem(sys.modules, package, None)
  monkeypatch.delitem(sys.modules, f'grit_jax.evaluate.{module}', raising=False)
  monkeypatch.delattr(grit_jax.evaluate, module, raising=False)
  flags = command.make_parser().parse_args([name, '--model=a', '--tasks=b'])
  with pytest.raises(
    UserError,
    match=rf"{package}\S* is not installed.*'grit_jax\[{name}\]'",
  ):
    command.evaluate(flags)
