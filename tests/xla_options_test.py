"""Tests of the table of XLA's options."""

import jax

from grit_jax.xla_options import compiler_options


def test_a_device_that_is_not_in_the_table_has_none():
  assert compiler_options(jax.devices()[0]) == {}
