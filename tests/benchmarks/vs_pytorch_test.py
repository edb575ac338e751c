"""The race against PyTorch, end to end at its smallest."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytestmark = [
  pytest.mark.e2e,
  pytest.mark.skipif(
    not importlib.util.find_spec('torch'), reason='PyTorch is not installed'
  ),
]

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 2
# Both sides compute in float32, in another order, and divide similarities by
# the temperature of 0.02.
TOLERANCE = 1e-4


@pytest.fixture(scope='module')
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
  """What the benchmark writes; under a second of training."""
  output = tmp_path_factory.mktemp('race') / 'result.json'
  run = subprocess.run(
    [
      sys.executable, 'benchmarks/vs_pytorch.py', '--preset=tiny',
      '--layers=1', f'--steps={STEPS}', '--turns=1',
      '--workload=mix', '--nocompiled', f'--output={output}',
    ],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert not run.returncode, run.stderr
  assert 'grit_jax is' in run.stdout
  return json.loads(output.read_text())


def test_both_sides_compute_the_same_losses_in_every_step(result: dict):
  losses = result['workloads']['mix']['losses']
  ours, theirs = (np.array(losses[side]) for side in ('grit_jax', 'pytorch'))
  assert ours.shape == (STEPS, 2)
  np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE)


def test_both_sides_count_the_same_useful_tokens(result: dict):
  figures = result['workloads']['mix']
  counts = {
    turn['tokens'] for turns in figures['turns'].values() for turn in turns
  }
  assert counts == {figures['useful_tokens']}


def test_the_file_has_the_figures_of_both_sides(result: dict):
  figures = result['workloads']['mix']
  assert set(figures['summary']) == {'grit_jax', 'pytorch'}
  for row in figures['summary'].values():
    for name in (
      'tokens_per_second',
      'speedup_of_grit_jax',
      'computed_of_useful',
      'peak_mib',
      'utilisation',
    ):
      assert row[name] > 0, name
  packed = figures['summary']['grit_jax']['computed_of_useful']
  assert packed < figures['summary']['pytorch']['computed_of_useful']
  for found in figures['products'].values():
    assert len(found) == len(figures['product_shapes'])
