"""Tests of opening a folder of Hugging Face: strictly, and part by part."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grit_jax.config import RotaryScalingConfig
from grit_jax.convert import hf_folder, keys
from grit_jax.convert.hf_folder import HfFolder
from grit_jax.errors import UserError
from grit_jax.models.attention import rotary_frequencies

MIXTRAL = {
  'model_type': 'mixtral', 'num_local_experts': 5, 'num_experts_per_tok': 2,
  'intermediate_size': 20,
}  # fmt: skip
UP = 'model.layers.1.mlp.up_proj.weight'


def whole(folder: HfFolder, tensor: keys.Tensor) -> tuple[slice, ...]:
  return tuple(slice(0, n) for n in keys.slice_shape(tensor, folder.model))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize(
  'changes',
  [{}, {'tie_word_embeddings': True}, {'model_type': 'mistral'}, MIXTRAL],
  ids=['llama', 'tied', 'mistral', 'mixtral'],
)
def test_every_tensor_is_read_bitwise_in_our_layout(
  tmp_path, write_hf: Callable, dtype: str, shards: int, changes: dict
):
  written = write_hf(tmp_path / 'hf', dtype, shards, **changes)
  folder = HfFolder(tmp_path / 'hf')
  assert {tensor.name for tensor in folder.tensors} == set(written)
  assert folder.dtype == ('bfloat16' if dtype == 'bfloat16' else 'float32')
  assert folder.model.param_dtype == folder.dtype
  for tensor in folder.tensors:
    found = folder.read(tensor, whole(folder, tensor))
    # float16 is widened to float32, which holds all of its values.
    value = written[tensor.name].astype(found.dtype)
    expected = np.zeros(keys.slice_shape(tensor, folder.model), found.dtype)
    value = value.T if tensor.transposed else value
    expected[tuple(slice(n) for n in value.shape)] = value
    assert found.flags.c_contiguous and found.dtype == folder.dtype
    np.testing.assert_array_equal(
      found.view(np.uint8), expected.view(np.uint8), err_msg=tensor.name
    )


def test_a_window_is_that_part_of_the_whole(
  tmp_path, write_hf: Callable, monkeypatch
):
  write_hf(tmp_path / 'hf')
  folder = HfFolder(tmp_path / 'hf')
  rng = np.random.default_rng(0)
  # So small that a tensor is read in several blocks, and copied in tiles.
  monkeypatch.setattr(hf_folder, 'BLOCK_BYTES', 600)
  monkeypatch.setattr(hf_folder, 'TILE', (3, 5))
  for tensor in folder.tensors:
    complete = folder.read(tensor, whole(folder, tensor))
    for _ in range(4):
      window = tuple(
        slice(*sorted(rng.choice(size + 1, 2, replace=False)))
        for size in complete.shape
      )
      np.testing.assert_array_equal(
        folder.read(tensor, window), complete[window], err_msg=tensor.name
      )


def test_a_mixture_of_dtypes_becomes_float32(
  tmp_path, write_hf: Callable, draw_tensors: Callable, caplog
):
  caplog.set_level('INFO')
  write_hf(tmp_path / 'hf', 'bfloat16')
  path = tmp_path / 'hf' / 'model.safetensors'
  tensors = load_file(path)
  tensors['model.norm.weight'] = tensors['model.norm.weight'].astype('float32')
  save_file(tensors, path)
  folder = HfFolder(tmp_path / 'hf')
  assert folder.dtype == 'float32'
  assert 'bfloat16 (29), float32 (1)' in caplog.text
  tensor = next(t for t in folder.tensors if t.name == UP)
  found = folder.read(tensor, whole(folder, tensor))
  np.testing.assert_array_equal(found, tensors[UP].T.astype('float32'))


def edit_tensors(folder: pathlib.Path, edit: Callable) -> None:
  path = folder / 'model.safetensors'
  tensors = load_file(path)
  edit(tensors)
  save_file(tensors, path)


def edit_json(path: pathlib.Path, edit: Callable) -> None:
  content = json.loads(path.read_text())
  edit(content)
  path.write_text(json.dumps(content))


TENSOR_MISTAKES = {
  'missing': (lambda t: t.pop(UP), f'{UP} is missing'),
  'unknown': (
    lambda t: t.update({'model.norm.bias': np.zeros(36, 'float32')}),
    r'model\.norm\.bias \[36\] is not known',
  ),
  'misshapen': (
    lambda t: t.update({UP: t[UP].T.copy()}),
    rf'{UP} is \[36, 52\], but the config makes it \[52, 36\]',
  ),
  'dtype': (
    lambda t: t.update({UP: t[UP].astype('int8')}),
    f'{UP} is of dtype I8, not one of F32, BF16, F16',
  ),
}


@pytest.mark.parametrize('mistake', TENSOR_MISTAKES)
def test_tensors_of_another_model_are_named(
  tmp_path, write_hf: Callable, mistake: str
):
  edit, message = TENSOR_MISTAKES[mistake]
  write_hf(tmp_path / 'hf')
  edit_tensors(tmp_path / 'hf', edit)
  with pytest.raises(UserError, match=message):
    HfFolder(tmp_path / 'hf')


def test_many_problems_are_a_short_message(tmp_path, write_hf: Callable):
  write_hf(tmp_path / 'hf')
  edit_json(tmp_path / 'hf' / 'config.json', lambda c: c.update(hidden_size=48))
  with pytest.raises(UserError) as error:
    HfFolder(tmp_path / 'hf')
  lines = str(error.value).splitlines()
  assert len(lines) == 12 and lines[-1] == '  ... and 20 more'
  assert 'lm_head.weight is [407, 36], but the config' in lines[1]


def test_a_damaged_file_is_named(tmp_path, write_hf: Callable):
  write_hf(tmp_path / 'hf')
  path = tmp_path / 'hf' / 'model.safetensors'
  content = path.read_bytes()
  for damaged, message in (
    (content[:-1], 'it is damaged, or was not copied to its end'),
    (content[:100], 'it is damaged'),
    (b'', 'it is damaged'),
    (content + b'\0', 'it is damaged'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'a pointer of Git LFS'),
  ):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=f'model.safetensors .*{message}'):
      HfFolder(tmp_path / 'hf')


def test_a_file_that_is_cut_after_it_was_opened_is_named(
  tmp_path, write_hf: Callable
):
  write_hf(tmp_path / 'hf')
  folder = HfFolder(tmp_path / 'hf')
  path = tmp_path / 'hf' / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match='model.safetensors cannot be read'):
    folder.read(folder.tensors[0], whole(folder, folder.tensors[0]))


INDEX_MISTAKES = {
  'absent-file': (
    lambda index, folder: (folder / sorted(set(index.values()))[1]).unlink(),
    'names 3 files, of which 1 are not in the folder: model-00002-of-00003',
  ),
  'wrong-file': (
    lambda index, folder: index.update({UP: sorted(set(index.values()))[
      index[UP] == sorted(set(index.values()))[0]
    ]}),
    f'{UP} is not in model-0000',
  ),
  'unlisted': (lambda index, folder: index.pop(UP), f'lacks {UP}, which model'),
  'unheld': (
    lambda index, folder: index.update(new=index[UP]), 'new is not in model'
  ),
}  # fmt: skip


@pytest.mark.parametrize('mistake', INDEX_MISTAKES)
def test_an_index_that_contradicts_its_files_is_refused(
  tmp_path, write_hf: Callable, mistake: str
):
  edit, message = INDEX_MISTAKES[mistake]
  folder = tmp_path / 'hf'
  write_hf(folder, shards=3)
  edit_json(
    folder / 'model.safetensors.index.json',
    lambda content: edit(content['weight_map'], folder),
  )
  with pytest.raises(UserError, match=message):
    HfFolder(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path, write_hf: Callable):
  folder = tmp_path / 'hf'
  write_hf(folder, shards=3)
  paths = sorted(folder.glob('model-*'))
  tensors = load_file(paths[0])
  name = next(iter(load_file(paths[1])))
  tensors[name] = load_file(paths[1])[name]
  save_file(tensors, paths[0])
  with pytest.raises(UserError, match=f'{name} is in two files'):
    HfFolder(folder)


def test_one_file_and_an_index_are_refused(tmp_path, write_hf: Callable):
  write_hf(tmp_path / 'hf', shards=2)
  write_hf(tmp_path / 'one')
  shutil.copy(tmp_path / 'one' / 'model.safetensors', tmp_path / 'hf')
  with pytest.raises(UserError, match='has both model.safetensors and'):
    HfFolder(tmp_path / 'hf')


def test_files_of_pytorch_alone_are_refused_with_the_way_out(
  tmp_path, write_hf: Callable
):
  folder = tmp_path / 'hf'
  write_hf(folder)
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  with pytest.raises(UserError, match=r'pytorch_model.bin.*save_pretrained'):
    HfFolder(folder)
  (folder / 'pytorch_model.bin').unlink()
  with pytest.raises(UserError, match='no model.safetensors and no model'):
    HfFolder(folder)


def test_what_is_no_local_folder_is_refused(tmp_path):
  with pytest.raises(UserError, match='none is not a folder'):
    HfFolder(tmp_path / 'none')
  with pytest.raises(UserError, match='gs://b/m: safetensors reads local'):
    HfFolder('gs://b/m')


def test_a_tokenizer_is_needed_and_must_fit(tmp_path, write_hf: Callable):
  folder = tmp_path / 'hf'
  write_hf(folder)
  (folder / 'tokenizer.model').rename(tmp_path / 'tokenizer.model')
  with pytest.raises(UserError, match='tokenizer.model'):
    HfFolder(folder)
  write_hf(tmp_path / 'small', vocab_size=399)
  with pytest.raises(UserError, match='has 400 ids, .* vocab_size=399'):
    HfFolder(tmp_path / 'small')


def test_buffers_of_old_folders_are_checked_and_left_out(
  tmp_path, write_hf: Callable, caplog
):
  caplog.set_level('INFO')
  folder = tmp_path / 'hf'
  write_hf(folder)
  frequencies = rotary_frequencies(10, 500.0, RotaryScalingConfig())
  name = 'model.layers.{}.self_attn.rotary_emb.inv_freq'
  edit_tensors(
    folder,
    lambda t: t.update({name.format(i): frequencies for i in range(3)}),
  )
  assert len(HfFolder(folder).tensors) == 30
  assert '3 tensors say what is known already' in caplog.text
  edit_tensors(folder, lambda t: t.update({name.format(1): 2 * frequencies}))
  with pytest.raises(UserError, match=r'layers\.1\..* contradicts'):
    HfFolder(folder)


def test_a_second_head_beside_tied_embeddings_must_be_the_same(
  tmp_path, write_hf: Callable
):
  folder = tmp_path / 'hf'
  written = write_hf(folder, tie_word_embeddings=True)
  head = written['model.embed_tokens.weight'].copy()
  edit_tensors(folder, lambda t: t.update({'lm_head.weight': head}))
  assert 'head' not in {tensor.path for tensor in HfFolder(folder).tensors}
  head[-1, -1] = np.nextafter(head[-1, -1], np.float32(9))
  edit_tensors(folder, lambda t: t.update({'lm_head.weight': head}))
  with pytest.raises(UserError, match='tie_word_embeddings=True, but'):
    HfFolder(folder)


def test_widening_bfloat16_is_exact():
  values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
  widened = hf_folder._widen(values, np.dtype('float32'))
  np.testing.assert_array_equal(
    widened.view(np.uint32), values.view(np.uint16).astype(np.uint32) << 16
  )


def test_the_dense_module_of_another_tool_is_refused(
  tmp_path, write_hf: Callable
):
  folder = tmp_path / 'hf'
  write_hf(folder)
  (folder / '2_Dense').mkdir()
  dense = {
    'in_features': 36, 'out_features': 8, 'bias': True,
    'activation_function': 'torch.nn.modules.activation.Tanh',
  }  # fmt: skip
  (folder / '2_Dense' / 'config.json').write_text(json.dumps(dense))
  modules = [{'path': '2_Dense', 'type': 'sentence_transformers.models.Dense'}]
  (folder / 'modules.json').write_text(json.dumps(modules))
  with pytest.raises(UserError, match='Tanh.*is linear'):
    HfFolder(folder)
  dense['activation_function'] = 'torch.nn.modules.linear.Identity'
  (folder / '2_Dense' / 'config.json').write_text(json.dumps(dense))
  with pytest.raises(UserError, match=r'has a projection .*no grit_jax'):
    HfFolder(folder)


def test_a_runs_configuration_must_be_that_of_the_folder(
  tmp_path, write_hf: Callable
):
  folder = tmp_path / 'hf'
  write_hf(folder)
  run = HfFolder(folder).config
  model = dataclasses.replace(run.model, attention='cccc', pooling='lasttoken')
  run = dataclasses.asdict(dataclasses.replace(run, model=model))
  (folder / 'grit_jax.json').write_text(json.dumps(run))
  opened = HfFolder(folder)
  assert (opened.model.attention, opened.model.pooling) == ('cccc', 'lasttoken')
  assert dataclasses.asdict(opened.config) == run
  run['model']['rope_theta'] = 1e4
  (folder / 'grit_jax.json').write_text(json.dumps(run))
  with pytest.raises(UserError, match=r'model.rope_theta=10000\.0, but'):
    HfFolder(folder)


@pytest.mark.parametrize('name', ['num_hidden_layers', 'num_local_experts'])
def test_a_config_of_a_billion_layers_is_refused_by_what_the_files_hold(
  tmp_path, write_hf: Callable, name: str
):
  write_hf(tmp_path / 'hf', **MIXTRAL)
  path = tmp_path / 'hf' / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), name: 10**9}))
  with pytest.raises(UserError, match='1000000000.* tensors in all'):
    HfFolder(tmp_path / 'hf')


@pytest.mark.parametrize(
  'name',
  [
    'config.json',
    'model-00002-of-00003.safetensors',
    'model.safetensors.index.json',
    'tokenizer.model',
    'grit_jax.json',
    'modules.json',
  ],
)
@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_place_of_a_file_is_named(
  tmp_path, write_hf: Callable, name: str, make: Callable
):
  write_hf(tmp_path / 'hf', shards=3)
  (tmp_path / 'hf' / name).unlink(missing_ok=True)
  make(tmp_path / 'hf' / name)
  with pytest.raises(UserError, match=f'/{name}: a .* expected a regular file'):
    HfFolder(tmp_path / 'hf')


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('modules.json', '{}', 'is not a JSON list'),
    ('modules.json', '[1]', 'module 0 is not a JSON object'),
    ('modules.json', '[{"path": 1}]', "module 0: 'path' is 1, expected str"),
    ('model.safetensors.index.json', '[]', 'is not a JSON object'),
    ('model.safetensors.index.json', '{}', "'weight_map' is missing"),
    (
      'model.safetensors.index.json',
      '{"weight_map": {"a": 1}}',
      "weight_map: 'a' is 1, expected str",
    ),
    ('model.safetensors.index.json', '[' * 10**5, 'is not JSON'),
    ('grit_jax.json', '[]', 'is not a JSON object'),
  ],
)
def test_a_json_file_that_is_not_what_it_must_be_is_named(
  tmp_path, write_hf: Callable, name: str, content: str, message: str
):
  write_hf(tmp_path / 'hf', shards=3)
  (tmp_path / 'hf' / name).write_text(content)
  with pytest.raises(UserError, match=f'{name}.*{message}'):
    HfFolder(tmp_path / 'hf')
