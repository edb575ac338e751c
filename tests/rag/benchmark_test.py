"""The benchmark of latencies, with a small model and short texts."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest
from model_folders import PIECES

from grit_jax.config import Config
from grit_jax.convert.to_hf import to_hf
from grit_jax.models.presets import tiny
from grit_jax.rag import __main__ as command
from grit_jax.rag.benchmark import make_samples
from grit_jax.rag.prompts import Mode


@pytest.fixture(scope='module')
def shallow(tmp_path_factory, write_run) -> pathlib.Path:
  """A Hugging Face folder with random weights of one layer."""
  place = tmp_path_factory.mktemp('shallow')
  model = dataclasses.replace(
    tiny(), vocab_size=PIECES, num_layers=1, max_positions=1024
  )
  write_run(place / 'run', Config(model=model))
  to_hf(place / 'run', place / 'model')
  return place / 'model'


def test_samples_have_the_tokens_asked_for(model):
  long_document, long_query = make_samples(model.tokenizer, 50)
  assert long_document.tokens == long_query.tokens[::-1]
  assert long_document.tokens[0] == 1
  assert 45 <= long_document.tokens[1] <= 50
  ids = model.tokenizer.encode(long_document.document['text'])
  assert len(ids) == long_document.tokens[1]
  assert long_query.question == long_document.document['text']


@pytest.mark.e2e
def test_both_sides_are_timed_and_give_the_same_tokens(
  shallow, tmp_path, capsys
):
  output = tmp_path / 'rag.json'
  command.answer(
    command.make_parser().parse_args(
      [
        'benchmark', f'--model={shallow}', '--tokens=40', '--repeats=1',
        f'--output={output}',
      ]
    )
  )  # fmt: skip
  report = json.loads(output.read_text())
  sides = ['grit_jax']
  if importlib.util.find_spec('gritlm'):
    sides.append('pytorch')
  table = capsys.readouterr().out
  assert len(report['samples']) == 2
  for sample in report['samples']:
    assert list(sample['seconds']) == [mode.value for mode in Mode]
    for mode, seconds in sample['seconds'].items():
      assert f'| {mode} |' in table
      assert list(seconds) == sides
      assert all(
        len(times) == 1 and min(times) > 0 for times in seconds.values()
      )
    assert all(sample['same_tokens'].values())
  first = report['samples'][0]['seconds']
  for side in sides:
    cached, uncached = (
      first[mode][side][0] for mode in ('doc-caching', 'document-first')
    )
    gain = report['gains']['doc caching, long document'][side]
    assert gain == pytest.approx(1 - cached / uncached)
