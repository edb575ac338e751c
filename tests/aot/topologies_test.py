"""Tests of the table of topologies, and of the estimates made of it."""

import pytest

from grit_jax.aot.report import transfer_seconds
from grit_jax.aot.topologies import CHIPS, find_chip
from grit_jax.errors import UserError


@pytest.mark.parametrize('name', ['v5e:8x9', 'v7x:2x2x1', 'v5e', ''])
def test_an_unknown_topology_raises_and_names_those_there_are(name: str):
  with pytest.raises(UserError, match='v5e:8x8, .*v6e:4x8.*tpu7x:2x2x1'):
    find_chip(name)


def test_a_near_miss_is_told_what_was_meant():
  with pytest.raises(UserError, match='Did you mean v6e:4x8'):
    find_chip('6e:4x8')


def test_every_name_finds_its_chip():
  for family, chip in CHIPS.items():
    for name in chip.names:
      assert find_chip(f'{family}:{name}') is chip


def test_a_transfer_takes_what_all_but_the_own_shard_take():
  gather = {
    'kind': 'all-gather', 'group': 4, 'bytes': 7e9, 'times': 2,
    'between_slices': False,
  }  # fmt: skip
  # Three quarters of 7 GB, twice, at 70% of 100 GB/s.
  assert transfer_seconds(gather, 100e9) == pytest.approx(0.15)
  assert transfer_seconds(
    gather | {'kind': 'all-reduce'}, 100e9
  ) == pytest.approx(0.3)
