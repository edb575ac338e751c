"""Tests of an export's README.md: what it says of a run, and that it runs."""

import contextlib
import dataclasses
import io
import re

import numpy as np
import pytest

from grit_jax.config import (
  Config,
  DataConfig,
  ObjectiveConfig,
  RotaryScalingConfig,
)
from grit_jax.convert.model_card import is_for_vllm, write_card
from grit_jax.convert.snippets import FOLDER
from grit_jax.convert.to_hf import to_hf
from grit_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from grit_jax.models import presets

TOLERANCE = 1e-5  # Several float32 programs, vectors of length 1.

SECTION = re.compile(r'^### (.*)$', re.MULTILINE)
PYTHON = re.compile(r'```python\n(.*?)```', re.DOTALL)


def make_config(mode: str = 'unified', **model) -> Config:
  return Config(
    model=dataclasses.replace(presets.tiny(), vocab_size=407, **model),
    objective=ObjectiveConfig(mode=mode),
    data=DataConfig(paths='pairs.jsonl'),
  )


@pytest.fixture
def card(tokenizer_model):
  """Writes the card of a configuration."""

  def write(config: Config) -> str:
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    return write_card(config, tokenizer, 'bfloat16', 'my-model')

  return write


EMBEDDING_TOOLS = [
  'sentence-transformers',
  'mteb',
  'gritlm (PyTorch)',
  'transformers, for embedding',
]
GENERATION_TOOLS = [
  'transformers, for generation',
  'vLLM and llama.cpp, for generation',
]


@pytest.mark.parametrize(
  'changes, tools',
  [
    ({}, EMBEDDING_TOOLS + GENERATION_TOOLS),
    ({'mode': 'embedding'}, EMBEDDING_TOOLS),
    ({'mode': 'generative'}, GENERATION_TOOLS),
    (
      {'pooling': 'weightedmean', 'mode': 'embedding'},
      ['gritlm (PyTorch)', 'transformers, for embedding'],
    ),
    (
      {'projection_dim': 7, 'mode': 'embedding'},
      ['sentence-transformers', 'mteb', 'transformers, for embedding'],
    ),
    ({'attention': 'bccc', 'mode': 'embedding'}, []),
    ({'attention': 'cbcc'}, GENERATION_TOOLS),
    ({'attention': 'bbbc'}, EMBEDDING_TOOLS + GENERATION_TOOLS[:1]),
  ],
)
def test_each_run_has_the_tools_that_can_load_it(card, changes, tools):
  text = card(make_config(**changes))
  assert SECTION.findall(text) == tools


def test_what_a_tool_cannot_do_is_said(card):
  text = card(make_config(pooling='weightedmean'))
  assert 'Not with sentence-transformers. With `weightedmean` pooling' in text
  text = card(make_config(projection_dim=7))
  assert 'Not with PyTorch gritlm' in text
  text = card(make_config(attention='bccc'))
  assert 'With attention `bccc` a part of the embedding prompt' in text
  text = card(make_config(attention='bbbc'))
  assert 'not those that it was trained to give' in text


def test_minimum_of_transformers_is_that_of_the_attention(card):
  assert 'transformers>=5.2' in card(make_config())
  text = card(make_config(attention='cccc'))
  assert 'transformers>=5.2' not in text and 'is_causal' not in text


@pytest.mark.parametrize(
  'changes, version',
  [
    ({'embed_dim': 40}, '4.37'),
    ({}, '4.45'),
    ({'num_experts': 4}, '4.57'),
    ({'num_experts': 4, 'embed_dim': 40}, '4.37'),
    (
      {
        'embed_dim': 40,
        'family': 'llama',
        'rotary_scaling': RotaryScalingConfig('llama3', 8.0),
      },
      '4.45',
    ),
  ],
)
def test_least_version_is_one_that_knows_the_model(card, changes, version):
  text = card(make_config('generative', **changes))
  assert f"pip install 'transformers>={version}'" in text


def test_front_matter_and_facts(card):
  text = card(make_config('embedding', projection_dim=7))
  _, matter, body = text.split('---\n', 2)
  assert matter.splitlines() == [
    'library_name: sentence-transformers',
    'pipeline_tag: sentence-similarity',
    'tags:',
    '- grit',
    '- feature-extraction',
    '- sentence-transformers',
    '- sentence-similarity',
    '- mteb',
  ]
  assert body.startswith('\n# my-model\n\nA language model that embeds texts,')
  assert 'trained with grit_jax' in body
  assert 'mapped linearly, scaled to length 1: 7 numbers' in body
  assert '43,335, bfloat16' in body
  assert '2048 queries with 2 passages each (temperature 0.02)' in body
  assert 'conversations' not in body and '<|assistant|>' not in body
  text = card(make_config('generative'))
  assert 'pipeline_tag: text-generation\ntags:\n- grit\n- text-gen' in text
  assert '<|embed|>' not in text and '{answer}</s>' in text


def test_experts_are_counted(card):
  text = card(make_config(num_experts=4))
  assert 'MixtralForCausalLM: 2 layers' in text
  assert '4 experts, 2 a token' in text


def test_a_model_that_was_converted_is_not_said_to_be_trained(card):
  config = dataclasses.replace(make_config(), data=DataConfig())
  text = card(config)
  assert 'converted by grit_jax' in text and 'steps of' not in text


def test_vllm_is_named_where_it_finds_the_text(tokenizer_model):
  mistral_common = pytest.importorskip('mistral_common')
  [folder] = mistral_common.__path__
  mistral = load_tokenizer(f'{folder}/data/tokenizer.model.v1')
  assert is_for_vllm(make_config(), mistral)
  assert not is_for_vllm(make_config(), SentencePieceTokenizer(tokenizer_model))
  for changes in (
    {'pooling': 'cls'},
    {'attention': 'cccc'},
    {'projection_dim': 7},
    {'sliding_window': 9},
    {'num_experts': 4},
  ):
    assert not is_for_vllm(make_config(**changes), mistral)
  text = write_card(make_config(), mistral, 'bfloat16', 'my-model')
  assert '### vLLM, for embedding' in text


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'attention': 'cccc', 'pooling': 'lasttoken'},
    {'pooling': 'cls'},
    {'pooling': 'weightedmean'},
    {'projection_dim': 7},
  ],
  ids=['unified', 'causal-lasttoken', 'cls', 'weightedmean', 'projection'],
)
def test_python_snippets_run_and_agree(
  tmp_path, write_run, monkeypatch, changes
):
  for library in 'torch', 'transformers', 'sentence_transformers', 'gritlm':
    pytest.importorskip(library)
  mteb = pytest.importorskip('mteb')
  prompts = _spy_on_mteb(mteb, monkeypatch)
  write_run(tmp_path / 'run', make_config(**changes))
  to_hf(tmp_path / 'run', tmp_path / 'out')
  text = (tmp_path / 'out' / 'README.md').read_text()
  _, *parts = SECTION.split(text)
  sections = dict(zip(parts[::2], parts[1::2], strict=True))
  found, output = {}, {}
  for tool, section in sections.items():
    for snippet in PYTHON.findall(section):
      variables: dict = {}
      with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet.replace(FOLDER, str(tmp_path / 'out')), variables)
      output[tool] = printed.getvalue()
      if 'documents' in variables:
        found[tool] = np.concatenate(
          [variables['queries'], variables['documents']]
        )
  assert len(output) == len(sections) - 1  # all but that of the servers
  assert all(output.values())
  expected = found.pop('transformers, for embedding')
  assert expected.shape == (3, changes.get('projection_dim', 32))
  np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-5)
  assert found
  for tool, embeddings in found.items():
    difference = np.abs(embeddings - expected).max()
    assert difference < TOLERANCE, tool
  if 'mteb' in sections:
    # Of queries and passages, in both splits of the task.
    assert prompts == 2 * [
      '<|user|>\nRetrieve text based on user query.\n<|embed|>\n',
      None,
    ]


def _spy_on_mteb(mteb, monkeypatch) -> list[str | None]:
  """Gives mteb a task in memory; returns the list of prompts it will use."""
  from mteb.mocks.mock_tasks import MockRetrievalTask

  monkeypatch.setattr(mteb, 'get_tasks', lambda tasks: [MockRetrievalTask()])
  prompts: list[str | None] = []
  evaluate = mteb.evaluate

  def watch(model, *arguments, **options):
    inner = model.model.encode

    def record(*texts, prompt=None, **others):
      prompts.append(prompt)
      return inner(*texts, prompt=prompt, **others)

    model.model.encode = record
    return evaluate(model, *arguments, **options)

  monkeypatch.setattr(mteb, 'evaluate', watch)
  return prompts
