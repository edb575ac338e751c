"""Tests of starting from the weights of a folder."""

import argparse
import dataclasses
import inspect
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grit_jax.checkpoint import flatten
from grit_jax.config import Config, DataConfig, ModelConfig
from grit_jax.convert import hf_config, keys
from grit_jax.convert.from_hf import from_hf
from grit_jax.convert.streamed import StreamedArray, write_checkpoint
from grit_jax.convert.to_hf import to_hf
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.errors import ConfigError, UserError
from grit_jax.initial import (
  find_change,
  load_model,
  open_initial,
  take_architecture,
)
from grit_jax.models import presets
from grit_jax.models.quantization import quantize

# 343 ids are padded to 512: two shards of the vocabulary end in padding.
SOURCE = dataclasses.replace(presets.tiny(), vocab_size=343)
PIECES = 340


def make_config(model: ModelConfig) -> Config:
  data = DataConfig(
    paths='x', max_query_tokens=8, max_passage_tokens=8, max_generative_tokens=8
  )
  return Config(model=model, init_from='folder', data=data)


def draw(model: ModelConfig, dtype: str) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    tensor.name: rng.standard_normal(tensor.shape).astype(dtype)
    for tensor in keys.tensors(model)
  }


def assemble(
  model: ModelConfig, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The decoder's weights, put together in plain numpy."""
  weights = {
    path: np.zeros(shape, 'float32')
    for path, shape in keys.weight_shapes(model).items()
  }
  for tensor in keys.tensors(model):
    value = tensors[tensor.name].astype('float32')
    value = value.T if tensor.transposed else value
    part = weights[tensor.path][tensor.index]
    part[tuple(slice(length) for length in value.shape)] = value
  return weights


@pytest.fixture(scope='module')
def tokenizer_model() -> bytes:
  return train_tokenizer([inspect.getsource(argparse)], PIECES)


@pytest.fixture(scope='module')
def sources(tmp_path_factory, tokenizer_model) -> Callable[..., pathlib.Path]:
  """Makes a Hugging Face folder or a converted checkpoint, once each."""
  root = tmp_path_factory.mktemp('sources')

  def make(kind: str, dtype: str = 'float32') -> pathlib.Path:
    folder = root / dtype
    if not folder.exists():
      folder.mkdir()
      config = hf_config.from_model(SOURCE, dtype, bos=1, eos=2)
      (folder / 'config.json').write_text(json.dumps(config))
      (folder / 'tokenizer.model').write_bytes(tokenizer_model)
      save_file(draw(SOURCE, dtype), folder / 'model.safetensors')
      from_hf(folder, root / f'{dtype}-checkpoint')
    return folder if kind == 'folder' else root / f'{dtype}-checkpoint'

  return make


@pytest.mark.parametrize('kind', ['folder', 'checkpoint'])
@pytest.mark.parametrize('sizes', [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize(
  ('stored', 'wanted'),
  [('float32', 'float32'), ('bfloat16', 'float32'), ('float32', 'bfloat16')],
)
def test_weights_are_those_of_the_source_on_every_mesh(
  sources, mesh_of, kind, sizes, stored, wanted
):
  initial = open_initial(sources(kind, stored))
  model = dataclasses.replace(
    presets.of_init_from(), param_dtype=wanted, dtype='float32'
  )
  config = take_architecture(make_config(model), initial)
  with jax.set_mesh(mesh_of(*sizes)):
    decoder = load_model(config, initial, jax.random.key(0))
  expected = assemble(SOURCE, draw(SOURCE, stored))
  for path, weight in flatten(decoder).items():
    assert weight.dtype == wanted
    np.testing.assert_array_equal(
      np.asarray(weight), expected[path].astype(wanted), strict=True
    )


@pytest.mark.parametrize('kind', ['folder', 'checkpoint'])
def test_every_part_is_read_once_and_no_more_than_a_shard(
  sources, mesh_of, kind, monkeypatch
):
  initial = open_initial(sources(kind))
  read = type(initial).read
  sizes: dict[str, list[int]] = {}

  def spy(self, path, index, dtype):
    part = read(self, path, index, dtype)
    sizes.setdefault(path, []).append(part.size)
    return part

  monkeypatch.setattr(type(initial), 'read', spy)
  config = take_architecture(make_config(presets.of_init_from()), initial)
  with jax.set_mesh(mesh_of(2, 2, 2)):
    decoder = load_model(config, initial, jax.random.key(0))
  for path, weight in flatten(decoder).items():
    # Two copies over `data`, which one process reads once.
    assert sum(sizes[path]) == weight.size
    shard = weight.addressable_shards[0].data.size
    assert set(sizes[path]) == {shard}


def test_a_folder_reads_from_the_disk_what_a_shard_needs(sources, monkeypatch):
  initial = open_initial(sources('folder'))
  windows = []
  folder = initial._folder
  read = folder.read
  monkeypatch.setattr(
    folder,
    'read',
    lambda tensor, window: windows.append(tensor.name) or read(tensor, window),
  )
  index = (slice(1, 2), slice(0, 16), slice(0, 48))
  part = initial.read('blocks/mlp/up', index, np.dtype('float32'))
  assert windows == ['model.layers.1.mlp.up_proj.weight']
  expected = draw(SOURCE, 'float32')[windows[0]].T[:16]
  np.testing.assert_array_equal(part, expected[None])


def test_damaged_weights_of_a_checkpoint_are_named(sources, mesh_of, tmp_path):
  folder = shutil.copytree(sources('checkpoint'), tmp_path / 'damaged')
  for chunk in (folder / 'state/model.blocks.mlp.up').glob('0.*'):
    chunk.write_bytes(b'not a chunk')
  initial = open_initial(folder)
  config = take_architecture(make_config(presets.of_init_from()), initial)
  with (
    jax.set_mesh(mesh_of(1, 2, 1)),
    pytest.raises(UserError, match='damaged: model/blocks/mlp/up cannot be'),
  ):
    load_model(config, initial, jax.random.key(0))


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_weights_that_are_quantised_as_they_are_read_are_those_of_quantize(
  sources, mesh_of, kind: str
):
  initial = open_initial(sources('folder'))
  config = take_architecture(make_config(presets.of_init_from()), initial)
  key = jax.random.key(0)
  with jax.set_mesh(mesh_of(1, 4, 1)):
    streamed = load_model(config, initial, key, kind)
    whole = quantize(load_model(config, initial, key), kind)
  jax.tree.map(np.testing.assert_array_equal, streamed, whole)


def test_a_new_projection_is_drawn_and_sharded(sources, mesh_of):
  initial = open_initial(sources('folder'))
  model = dataclasses.replace(presets.of_init_from(), projection_dim=6)
  config = take_architecture(make_config(model), initial)
  with jax.set_mesh(mesh_of(1, 8, 1)):
    decoder = load_model(config, initial, jax.random.key(0))
  assert decoder.projection[...].shape == (32, 6)
  assert decoder.projection[...].addressable_shards[0].data.shape == (4, 6)
  assert float(np.std(decoder.projection[...])) > 0
  assert not np.asarray(decoder.projection_bias[...]).any()


def test_the_architecture_is_taken_and_the_rest_is_the_configs(sources):
  initial = open_initial(sources('folder'))
  model = dataclasses.replace(
    presets.of_init_from(), attention='cccc', pooling='lasttoken'
  )
  taken = take_architecture(make_config(model), initial).model
  assert taken == dataclasses.replace(
    SOURCE, attention='cccc', pooling='lasttoken', dtype='bfloat16'
  )


def test_another_architecture_is_refused_with_every_difference(sources):
  initial = open_initial(sources('checkpoint'))
  model = dataclasses.replace(SOURCE, num_layers=3, rope_theta=5e5)
  message = (
    r'model\.num_layers=3, there 2; model\.rope_theta=500000\.0, there 10000\.0'
  )
  with pytest.raises(ConfigError, match=message):
    take_architecture(make_config(model), initial)
  same = dataclasses.replace(SOURCE, vocab_size=0)
  assert take_architecture(make_config(same), initial).model == SOURCE


def test_texts_longer_than_the_models_positions_are_refused(sources):
  initial = open_initial(sources('folder'))
  config = make_config(presets.of_init_from())
  data = dataclasses.replace(
    config.data, max_query_tokens=40000, row_length=40000
  )
  config = dataclasses.replace(config, data=data)
  with pytest.raises(
    ConfigError, match=r'more than model\.max_positions=32768'
  ):
    take_architecture(config, initial)


def test_the_tokenizer_comes_with_the_model(sources, tokenizer_model):
  for kind in 'folder', 'checkpoint':
    initial = open_initial(sources(kind))
    assert initial.tokenizer.files == {'tokenizer.model': tokenizer_model}


def test_what_is_no_model_is_refused(tmp_path):
  with pytest.raises(UserError, match='neither a Hugging Face folder'):
    open_initial(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  with pytest.raises(UserError, match='bert'):
    open_initial(tmp_path)


@pytest.mark.parametrize('name', ['num_layers', 'num_experts'])
def test_a_checkpoint_that_says_a_billion_layers_is_refused(
  tmp_path, tokenizer_model, name
):
  config = make_config(dataclasses.replace(SOURCE, **{name: 10**9}))
  norms = StreamedArray(
    (2, SOURCE.embed_dim),
    np.dtype('float32'),
    lambda: iter([((), np.ones((2, SOURCE.embed_dim), np.float32))]),
  )
  write_checkpoint(
    tmp_path / 'run',
    {'blocks/attention_norm': norms},
    dataclasses.asdict(config),
    {'tokenizer.model': tokenizer_model},
  )
  for read in open_initial, lambda run: to_hf(run, tmp_path / 'hf'):
    with pytest.raises(UserError, match='weights are not those of its config'):
      read(tmp_path / 'run')


def test_a_base_whose_file_changed_is_told_from_what_it_was(sources, tmp_path):
  folder = shutil.copytree(sources('folder'), tmp_path / 'folder')
  was = open_initial(folder)
  kept = was.fingerprint(), was.checksums()
  # A conversion is the same model, and knows the files that it was made of.
  checkpoint = open_initial(sources('checkpoint'))
  assert checkpoint.checksums() == kept[1] and list(kept[1])
  assert find_change(checkpoint, *kept) == ''
  path = folder / 'model.safetensors'
  save_file(load_file(path), path, {'format': 'other'})
  assert find_change(open_initial(folder), *kept) == (
    'another content of model.safetensors'
  )
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**config, 'rope_theta': 9.0}))
  assert 'another configuration' in find_change(open_initial(folder), *kept)
