"""Tests of benchmarks/joint_vs_single.py and what it is made of."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from joint import corpus, plan, results
from PIL import Image
from small_run import ROOT, read_metrics

from grit_jax.data import standard_library
from grit_jax.data.standard_library import Function
from grit_jax.errors import ConfigError

# The same weights and texts, in float32, but in another program.
TOLERANCE = 1e-5
UNIFIED, EMBEDDING = 'unified', 'embedding only'


def run_command(
  folder: pathlib.Path, *flags: str
) -> subprocess.CompletedProcess:
  return subprocess.run(
    [
      sys.executable, ROOT / 'benchmarks' / 'joint_vs_single.py',
      f'--folder={folder}', '--scale=tiny', *flags,
    ],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """What the command leaves of two objectives, one seed and two steps."""
  folder = tmp_path_factory.mktemp('joint')
  done = run_command(folder, f'--runs={UNIFIED}', f'--runs={EMBEDDING}')
  assert done.returncode == 0, done.stdout + done.stderr
  assert 'Run 2 of 2: embedding only, seed 0' in done.stdout
  return folder


@pytest.mark.e2e
def test_figures_are_those_of_the_runs(folder):
  found = json.loads((folder / 'results.json').read_text())
  assert list(found['variants']) == [UNIFIED, EMBEDDING]
  assert set(found['variants'][UNIFIED]) == set(results.METRICS)
  after = {
    name: json.loads((folder / f'{name}-0' / 'evaluation.json').read_text())
    for name in ('unified', 'embedding_only')
  }
  for metric, mine in found['variants'][UNIFIED].items():
    assert mine['values'] == [after['unified']['after'][metric]]
  less = found['unified_less'][EMBEDDING]['ndcg_at_10']['mean']
  assert less == (
    after['unified']['after']['ndcg_at_10']
    - after['embedding_only']['after']['ndcg_at_10']
  )
  rows = (folder / 'results.md').read_text().splitlines()
  assert [row for row in rows if row.startswith('| embedding only | 1 |')]
  assert (folder / 'results.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.e2e
def test_the_specialist_starts_from_the_same_model_and_sees_the_same_pairs(
  folder,
):
  ours, theirs = (
    read_metrics(folder / f'{name}-0') for name in ('unified', 'embedding_only')
  )
  assert [line['step'] for line in theirs] == [1, 2]
  assert 'loss_gen' in ours[0] and 'loss_gen' not in theirs[0]
  # The first step's loss is of the first weights on the step's pairs.
  np.testing.assert_allclose(
    ours[0]['loss_rep'], theirs[0]['loss_rep'], rtol=TOLERANCE
  )
  before = [
    json.loads((folder / f'{name}-0' / 'evaluation.json').read_text())['before']
    for name in ('unified', 'embedding_only')
  ]
  assert before[1].items() <= before[0].items()


@pytest.mark.e2e
def test_what_has_ended_is_not_run_again(folder):
  files = {
    path: path.stat().st_mtime_ns
    for name in ('unified-0', 'embedding_only-0')
    for path in (folder / name).iterdir()
  }
  expected = (folder / 'results.json').read_bytes()
  (folder / 'results.json').unlink()
  done = run_command(folder, f'--runs={UNIFIED}', f'--runs={EMBEDDING}')
  assert done.returncode == 0, done.stderr
  assert {path: path.stat().st_mtime_ns for path in files} == files
  assert (folder / 'results.json').read_bytes() == expected


def test_a_folder_of_other_settings_is_refused(tmp_path):
  scale = plan.SCALES['tiny']
  plan.check_settings(scale, tmp_path)
  plan.check_settings(scale, tmp_path)
  with pytest.raises(ConfigError, match=r'settings\.json is of other settings'):
    plan.check_settings(dataclasses.replace(scale, steps=3), tmp_path)


@pytest.mark.parametrize('scale', plan.SCALES.values(), ids=list(plan.SCALES))
def test_runs_of_one_seed_differ_in_their_change_alone(scale, tmp_path):
  planned = plan.plan_runs(scale, [])
  assert len({(name, seed) for name, _, seed in planned}) == len(planned)
  assert [name for name, _, _ in planned[:3]] == list(plan.CORE)
  for _, changes, seed in planned:
    unified = plan.make_config(scale, tmp_path, {}, seed)
    config = plan.make_config(scale, tmp_path, changes, seed)
    found = dataclasses.asdict(config)
    if 'batches' in changes:
      # As many records, but in other batches.
      assert config.steps != unified.steps
      for name in 'embedding_batch', 'generative_batch':
        seen = getattr(unified.data, name) * unified.steps
        assert getattr(config.data, name) * config.steps == seen
        found['data'][name] = getattr(unified.data, name)
      found['steps'] = unified.steps
    for key in set(changes) - {'batches'}:
      group, name = key.split('.')
      assert found[group][name] != getattr(getattr(unified, group), name)
      found[group][name] = getattr(getattr(unified, group), name)
    assert found == dataclasses.asdict(unified)


def make_run(variant: str, seed: int, **after: float) -> dict:
  return {
    'variant': variant,
    'seed': seed,
    'before': {'recall_at_10': 0.1, 'generative_loss': 6.0},
    'tfidf': {'recall_at_10': 0.6},
    'after': after,
  }


def test_differences_are_taken_seed_by_seed():
  # The seeds move both alike: what they differ by hardly spreads.
  recalls = {0: (0.30, 0.31), 1: (0.40, 0.42), 2: (0.60, 0.61), 3: (0.9, None)}
  runs = []
  for seed, (ours, theirs) in recalls.items():
    runs.append(make_run(UNIFIED, seed, recall_at_10=ours, generative_loss=3.0))
    if theirs is not None:
      runs.append(make_run(EMBEDDING, seed, recall_at_10=theirs))
  found = results.summarise(runs)
  ours = np.array([pair[0] for pair in recalls.values()])
  mine = found['variants'][UNIFIED]['recall_at_10']
  np.testing.assert_allclose(mine['mean'], ours.mean())
  np.testing.assert_allclose(mine['deviation'], ours.std(ddof=1))
  less = found['unified_less'][EMBEDDING]
  assert list(less) == ['recall_at_10']
  differences = np.array([-0.01, -0.02, -0.01])
  np.testing.assert_allclose(less['recall_at_10']['values'], differences)
  np.testing.assert_allclose(
    less['recall_at_10']['deviation'], differences.std(ddof=1)
  )
  assert UNIFIED not in found['unified_less']
  assert found['before']['TF-IDF']['recall_at_10']['mean'] == 0.6


def test_tables_show_spreads_where_there_are_several_seeds(tmp_path):
  runs = [
    make_run(UNIFIED, 0, recall_at_10=0.25, generative_loss=3.0),
    make_run(UNIFIED, 1, recall_at_10=0.35, generative_loss=3.5),
    make_run('generative only', 0, generative_loss=2.75),
  ]
  found = results.summarise(runs)
  lines = results.make_tables(found).splitlines()
  assert '| unified | 2 | 0.300 ± 0.071 |  | 3.250 ± 0.354 |' in lines
  assert '| generative only | 1 |  |  | 2.750 |' in lines
  assert '| TF-IDF | 1 | 0.600 |  |  |' in lines
  assert '| untrained | 2 | 0.100 ± 0.000 |  | 6.000 ± 0.000 |' in lines
  assert lines[-1] == '| generative only | 1 |  |  | +0.250 |'
  results.draw(found, tmp_path / 'results.png')
  width, height = Image.open(tmp_path / 'results.png').size
  assert width == 800 and height < 400


@pytest.fixture(scope='module')
def packages() -> dict[str, corpus.Packages]:
  packages, _ = corpus.read_packages({'train': 25, 'test': 15}, 40)
  return packages


def test_a_package_is_in_one_split_alone(packages):
  train, test = (set(packages[split]) for split in corpus.SPLITS)
  assert len(train) > 5 and len(test) > 2 and train.isdisjoint(test)
  for split, held_out in (('train', False), ('test', True)):
    for name, functions in packages[split].items():
      assert standard_library.in_test(name) == held_out
      assert len(functions) <= {'train': 25, 'test': 15}[split]
      assert {one.module.split('.')[0] for one in functions} == {name}


def test_no_text_of_test_is_in_train(packages):
  texts = {
    split: {
      text
      for functions in packages[split].values()
      for one in functions
      for text in (one.docstring, one.source)
    }
    for split in corpus.SPLITS
  }
  assert texts['train'].isdisjoint(texts['test'])


def test_files_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
  source = (
    'def f{0}(values):\n'
    '  """Do what f{0} does."""\n'
    '  return sum(value * {0} for value in range(values))\n'
  )
  good = [source.format(i) for i in range(3)]
  files = []
  for i, text in enumerate([*good, 'print 1', 'def f(:', 'a = "\0"']):
    files.append((f'p.m{i}', tmp_path / f'm{i}.py'))
    files[-1][1].write_text(text)
  monkeypatch.setattr(corpus, 'installed_files', lambda: {'p': files})
  packages, unreadable = corpus.read_packages({'train': 9, 'test': 9}, 0)
  assert unreadable == 3
  found = [one.name for part in packages.values() for one in part.get('p', [])]
  assert sorted(found) == ['f0', 'f1', 'f2']


def test_records_of_the_data_sets_share_no_function():
  functions = [
    Function(
      'p.m', f'C.f{i}' if i % 2 else f'f{i}', f'f{i}()', f'Do {i}.', f'body {i}'
    )
    for i in range(120)
  ]
  made = corpus.make_records({'p': functions, 'q': functions[:3]})
  pairs = ('functions', 'methods', 'summaries')
  assert all(len(made[name]) >= corpus.MINIMUM_FUNCTIONS for name in pairs)
  # Those of `q` are too few to be each other's negatives.
  assert sum(len(made[name]) for name in pairs) == 120
  # A query in one direction is no candidate in the other.
  texts = {
    name: {
      text for one in made[name] for text in (one['query'][1], one['pos'][0][1])
    }
    for name in pairs
  }
  assert len(set().union(*texts.values())) == 240
  assert all(one['query'][1].startswith('body') for one in made['summaries'])
  assert all(one['pos'][0][1].startswith('body') for one in made['functions'])
  for name in pairs:
    for one in made[name]:
      assert len(one['neg']) == standard_library.MAXIMUM_NEGATIVES
      assert one['pos'][0] not in one['neg']
