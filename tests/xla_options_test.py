"""Tests of the table of XLA's options."""

import jax
import pytest

from grit_jax.xla_options import OPTIONS, compiler_options


def test_a_cpu_has_none():
  assert compiler_options(jax.devices()[0]) == {}


@pytest.mark.parametrize('kind', OPTIONS)
def test_every_name_is_one_of_xlas_for_tpus(kind: str):
  # XLA refuses a name that it does not know; on a CPU, one of a TPU too.
  for name in OPTIONS[kind]:
    assert name.startswith('xla_tpu_')
