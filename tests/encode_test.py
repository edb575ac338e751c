"""Tests of the command that embeds a corpus."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from grit_jax import encode
from grit_jax.errors import ConfigError, UserError
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.index import Index
from grit_jax.initial import open_initial

DOCUMENTS = [
  {'_id': f'd{i}', 'title': 'Title' * (i % 2), 'text': 'some words ' * i}
  for i in range(11)
]


@pytest.fixture(scope='module')
def model(tmp_path_factory, write_hf) -> pathlib.Path:
  """A Hugging Face folder with random weights."""
  folder = tmp_path_factory.mktemp('root') / 'model'
  write_hf(folder, num_hidden_layers=1)
  return folder


@pytest.fixture
def corpus(tmp_path) -> pathlib.Path:
  path = tmp_path / 'corpus.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in DOCUMENTS))
  return path


def run(model: pathlib.Path, corpus: pathlib.Path, output: pathlib.Path, *more):
  flags = [f'--model={model}', f'--input={corpus}', f'--output={output}']
  more = ('--max_length=48', '--batch_size=2', '--shard_documents=4', *more)
  encode.encode(encode.make_parser().parse_args([*flags, *more]))


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    path.name: path.read_bytes()
    for path in folder.iterdir()
    if not path.name.endswith('lock')
  }


def test_the_index_holds_what_the_model_makes_of_the_documents(
  tmp_path, model, corpus, capsys
):
  run(model, corpus, tmp_path / 'index', '--instruction=Find it')
  assert 'an index of 11 documents' in capsys.readouterr().out
  index = Index.open(tmp_path / 'index')
  index.check()
  texts = [
    f'{d["title"]} {d["text"]}' if d['title'] else d['text'] for d in DOCUMENTS
  ]
  # In bfloat16 it matters which texts are embedded together: those of a shard.
  loaded = GritLM.load(model)
  expected = [
    loaded.encode(texts[start : start + 4], 'Find it', 48, batch_size=2)
    for start in (0, 4, 8)
  ]
  np.testing.assert_array_equal(
    index.embeddings(range(11)), np.concatenate(expected)
  )
  assert [d['id'] for d in index.documents(range(11))] == [
    d['_id'] for d in DOCUMENTS
  ]


def test_a_stopped_command_goes_on_and_writes_the_same(
  tmp_path, model, corpus, monkeypatch
):
  run(model, corpus, tmp_path / 'whole')
  embed, calls = GritLM.encode_corpus, []

  def stop(self, documents, **arguments):
    calls.append(len(documents))
    if len(calls) == 2:
      raise KeyboardInterrupt
    return embed(self, documents, **arguments)

  monkeypatch.setattr(GritLM, 'encode_corpus', stop)
  with pytest.raises(KeyboardInterrupt):
    run(model, corpus, tmp_path / 'index')
  assert len(Index.open(tmp_path / 'index')) == 4
  run(model, corpus, tmp_path / 'index')
  assert calls == [4, 4, 4, 3]
  assert files_of(tmp_path / 'index') == files_of(tmp_path / 'whole')
  # Of a whole index nothing is left to do, and no model is loaded.
  monkeypatch.setattr(GritLM, 'load', None)
  run(model, corpus, tmp_path / 'index')


def test_other_weights_do_not_go_on_and_a_copy_of_the_same_does(
  tmp_path, model, write_hf, corpus, monkeypatch
):
  run(model, corpus, tmp_path / 'index')
  copy = tmp_path / 'copy'
  shutil.copytree(model, copy)
  run(copy, corpus, tmp_path / 'index')
  write_hf(tmp_path / 'other', seed=1, num_hidden_layers=1)
  monkeypatch.setattr(GritLM, 'load', None)
  with pytest.raises(UserError, match='another content of model'):
    run(tmp_path / 'other', corpus, tmp_path / 'index')


def test_a_mistake_ends_in_one_message_that_names_it(tmp_path, model, corpus):
  with pytest.raises(UserError, match='/nothing is neither'):
    run(tmp_path / 'nothing', corpus, tmp_path / 'index')
  with pytest.raises(FileNotFoundError, match='nothing.jsonl'):
    run(model, tmp_path / 'nothing.jsonl', tmp_path / 'index')
  with pytest.raises(UserError, match='the instruction takes'):
    run(model, corpus, tmp_path / 'index', f'--instruction={"x y " * 48}')
  corpus.write_text('"one"\n{"text": 2}\n')
  with pytest.raises(UserError, match='jsonl:2: text: found the number 2'):
    run(model, corpus, tmp_path / 'index')
  with pytest.raises(ConfigError, match='--batch_size'):
    run(model, corpus, tmp_path / 'index', '--batch_size=0')


def test_one_bit_of_a_weight_changes_the_fingerprint(tmp_path, model):
  copy = tmp_path / 'copy'
  shutil.copytree(model, copy)
  whole = open_initial(model).fingerprint()
  # What lies beside the files of a model is no part of it.
  (copy / 'NOTES.md').write_text('A note.')
  assert open_initial(copy).fingerprint() == whole
  path = copy / 'model.safetensors'
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)
  assert open_initial(copy).fingerprint() != whole
