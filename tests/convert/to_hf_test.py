"""Tests of the export, as files: bits, refusals, and what a failure leaves."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from file_sizes import limit_file_sizes
from safetensors.numpy import load_file

from grit_jax.config import Config, DataConfig, ObjectiveConfig
from grit_jax.convert import keys, to_hf
from grit_jax.convert.from_hf import from_hf
from grit_jax.data.tokenizer import load_tokenizer
from grit_jax.errors import UserError
from grit_jax.models import presets

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = Config(
  model=dataclasses.replace(presets.tiny(), vocab_size=407),
  data=DataConfig(paths='pairs.jsonl'),
)
DTYPES = {
  'float32': np.float32,
  'bfloat16': ml_dtypes.bfloat16,
  'float16': np.float16,
}


def change(**model) -> Config:
  """The configuration with another model."""
  return dataclasses.replace(
    CONFIG, model=dataclasses.replace(CONFIG.model, **model)
  )


def load_folder(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the weights of a folder, in one file or more."""
  tensors = {}
  for path in sorted(folder.glob('*.safetensors')):
    found = load_file(path)
    assert not set(found) & set(tensors)
    tensors |= found
  return tensors


def test_a_change_of_any_file_of_an_export_is_named(tmp_path, write_run):
  """But of the card, which is for people."""
  write_run(tmp_path / 'run', change(projection_dim=8))
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'hf')
  files = sorted(p for p in (tmp_path / 'hf').rglob('*') if p.is_file())
  assert len(files) > 12
  for path in files:
    content = path.read_bytes()
    if path.name == 'README.md':
      continue
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    damages = [content[:middle] + flipped + content[middle + 1 :], b'']
    # Without it an export is as somebody else's folder.
    damages += [None] * (path.name != 'checksums.json')
    for damage in damages:
      path.unlink()
      if damage is not None:
        path.write_bytes(damage)
      with pytest.raises(UserError, match=path.name):
        from_hf(tmp_path / 'hf', tmp_path / 'out')
      path.write_bytes(content)
  from_hf(tmp_path / 'hf', tmp_path / 'out')


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  return (
    a.dtype == b.dtype
    and a.shape == b.shape
    and np.array_equal(
      np.ascontiguousarray(a).view(np.uint8),
      np.ascontiguousarray(b).view(np.uint8),
    )
  )


def files_in(folder: pathlib.Path) -> set[str]:
  return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('tied', [False, True])
def test_weights_are_bitwise_those_of_the_checkpoint(
  tmp_path, write_run, monkeypatch, param_dtype, tied
):
  # Odd pieces, none of which is a whole tensor.
  monkeypatch.setattr(to_hf, 'STRETCH', 7)
  monkeypatch.setattr(to_hf, 'TILE', 3)
  config = change(param_dtype=param_dtype, tie_embeddings=tied)
  weights = write_run(tmp_path / 'run', config)
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  found = load_folder(tmp_path / 'out')
  assert list(files_in(tmp_path / 'out') & {'model.safetensors'})
  expected = {
    'model.embed_tokens.weight': weights['embed'][:407],
    'model.norm.weight': weights['final_norm'],
  }
  if not tied:
    expected['lm_head.weight'] = weights['head'][:, :407].T
  for layer in range(config.model.num_layers):
    prefix = f'model.layers.{layer}.'
    for name, path in {
      'input_layernorm': 'attention_norm',
      'self_attn.q_proj': 'attention/q',
      'self_attn.k_proj': 'attention/k',
      'self_attn.v_proj': 'attention/v',
      'self_attn.o_proj': 'attention/o',
      'post_attention_layernorm': 'mlp_norm',
      'mlp.gate_proj': 'mlp/gate',
      'mlp.up_proj': 'mlp/up',
      'mlp.down_proj': 'mlp/down',
    }.items():
      weight = weights[f'blocks/{path}'][layer]
      expected[f'{prefix}{name}.weight'] = weight.T
  assert set(found) == set(expected)
  for name, array in expected.items():
    assert same_bits(found[name], array), name


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_cast_rounds_every_value_once(tmp_path, write_run, dtype):
  write_run(tmp_path / 'run', change(projection_dim=5))
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'same')
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out', dtype)
  for folder in '.', keys.PROJECTION_FOLDER:
    before = load_folder(tmp_path / 'same' / folder)
    after = load_folder(tmp_path / 'out' / folder)
    assert set(before) == set(after)
    for name, array in before.items():
      assert same_bits(after[name], array.astype(DTYPES[dtype])), name
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['torch_dtype'] == dtype


def test_shards_hold_the_same_weights(tmp_path, write_run):
  write_run(tmp_path / 'run', CONFIG)
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'one')
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'many', max_shard_bytes=20_000)
  one, many = load_folder(tmp_path / 'one'), load_folder(tmp_path / 'many')
  assert len(list((tmp_path / 'many').glob('*.safetensors'))) > 3
  assert set(one) == set(many)
  assert all(same_bits(one[name], many[name]) for name in one)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'tie_word_embeddings': True},
    {
      'rope_scaling': {
        'rope_type': 'llama3',
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 64,
      }
    },
    {
      'model_type': 'mistral',
      'architectures': ['MistralForCausalLM'],
      'sliding_window': None,
      'num_key_value_heads': 3,
    },
    {
      'model_type': 'mixtral',
      'architectures': ['MixtralForCausalLM'],
      'num_local_experts': 5,
      'num_experts_per_tok': 3,
      'intermediate_size': 20,
    },
  ],
  ids=['llama', 'tied', 'llama3', 'mistral', 'mixtral'],
)
def test_a_folder_comes_back_bitwise(tmp_path, write_hf, dtype, changes):
  before = write_hf(tmp_path / 'in', dtype, **changes)
  from_hf(tmp_path / 'in', tmp_path / 'checkpoint')
  to_hf.to_hf(tmp_path / 'checkpoint', tmp_path / 'out', max_shard_bytes=30_000)
  after = load_folder(tmp_path / 'out')
  assert set(after) == set(before)
  assert all(same_bits(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
  'changes',
  [
    {'projection_dim': 5},
    {'pooling': 'weightedmean', 'attention': 'bccc', 'sliding_window': 9},
    # sentence-transformers cannot compute it, so there is no list of modules.
    {'pooling': 'weightedmean', 'projection_dim': 5},
  ],
)
def test_an_export_comes_back_with_all_its_settings(
  tmp_path, write_run, changes
):
  weights = write_run(tmp_path / 'run', change(**changes))
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  from_hf(tmp_path / 'out', tmp_path / 'checkpoint')
  to_hf.to_hf(tmp_path / 'checkpoint', tmp_path / 'again')
  written = {path for path in (tmp_path / 'out').rglob('*') if path.is_file()}
  assert len(written) == len(
    [path for path in (tmp_path / 'again').rglob('*') if path.is_file()]
  )
  # The card's title is the folder's name.
  for path in written - {tmp_path / 'out' / 'README.md'}:
    again = tmp_path / 'again' / path.relative_to(tmp_path / 'out')
    assert path.read_bytes() == again.read_bytes(), path
  if 'projection_dim' in changes:
    found = load_folder(tmp_path / 'out' / keys.PROJECTION_FOLDER)
    assert same_bits(found['linear.weight'], weights['projection'].T)
    assert same_bits(found['linear.bias'], weights['projection_bias'])


def test_small_files_say_what_the_run_was(tmp_path, write_run, tokenizer_model):
  write_run(tmp_path / 'run', CONFIG)
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')

  def read(name: str):
    return json.loads((tmp_path / 'out' / name).read_text())

  assert read('grit_jax.json') == dataclasses.asdict(CONFIG)
  assert read('config.json')['architectures'] == ['MistralForCausalLM']
  assert read('generation_config.json') == {
    'bos_token_id': 1, 'do_sample': False, 'eos_token_id': 2, 'pad_token_id': 2
  }  # fmt: skip
  special = {
    'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '</s>',
    'unk_token': '<unk>',
  }  # fmt: skip
  assert read('special_tokens_map.json') == special
  settings = read('tokenizer_config.json')
  assert special.items() <= settings.items()
  assert settings['tokenizer_class'] == 'PreTrainedTokenizerFast'
  # By default transformers 4 adds token_type_ids, which no model here takes.
  assert settings['model_input_names'] == ['input_ids', 'attention_mask']
  assert settings['model_max_length'] == CONFIG.model.max_positions
  model = (tmp_path / 'out' / 'tokenizer.model').read_bytes()
  assert model == tokenizer_model
  assert (tmp_path / 'out' / 'README.md').read_text().count('# out\n') == 1


def test_a_json_tokenizer_keeps_its_own_special_tokens(
  tmp_path, write_run, json_tokenizer_files
):
  write_run(tmp_path / 'run', CONFIG, json_tokenizer_files)
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  assert 'tokenizer.model' not in files_in(tmp_path / 'out')
  settings = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
  assert settings['bos_token'] == '<|begin|>'
  assert settings['eos_token'] == settings['pad_token'] == '<|end|>'
  assert 'unk_token' not in settings
  assert "'<|begin|>'" in settings['chat_template']
  text = '<|begin|>a b\n'
  tokenizer = load_tokenizer(tmp_path / 'out')
  assert tokenizer.files.keys() == json_tokenizer_files.keys()
  assert tokenizer.decode(tokenizer.encode(text)) == 'a b\n'


@pytest.mark.parametrize('mode', ['embedding', 'generative'])
def test_a_mode_has_the_files_of_its_own_tools(tmp_path, write_run, mode):
  config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(mode=mode))
  write_run(tmp_path / 'run', config)
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  settings = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
  found = files_in(tmp_path / 'out')
  assert ('modules.json' in found) == (mode == 'embedding')
  assert ('chat_template' in settings) == (mode == 'generative')
  assert ('generation_config.json' in found) == (mode == 'generative')


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'final_norm': None}, 'final_norm is missing'),
    ({'blocks/mlp/bias': np.zeros((2, 3), np.float32)}, 'mlp/bias .* not know'),
    ({'blocks/mlp/up': np.zeros((2, 48, 32), np.float32)}, 'mlp/up is'),
    ({'embed': np.zeros((407, 32), np.float32)}, r'embed is \[407, 32\]'),
    ({'final_norm': np.ones(32, ml_dtypes.bfloat16)}, 'bfloat16, float32'),
  ],
)
def test_weights_of_another_model_are_refused(
  tmp_path, write_run, changes, message
):
  write_run(tmp_path / 'run', CONFIG, **changes)
  with pytest.raises(UserError, match=message):
    to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  assert files_in(tmp_path) == {'run'}


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path, write_run, value):
  weights = write_run(tmp_path / 'first', CONFIG)
  broken = weights['blocks/mlp/down'].copy()
  broken[1, -1, -1] = value
  write_run(tmp_path / 'run', CONFIG, **{'blocks/mlp/down': broken})
  with pytest.raises(UserError, match=r'layers\.1\.mlp\.down_proj'):
    to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  assert files_in(tmp_path) == {'first', 'run'}


def test_what_lies_in_the_vocabularys_padding_does_not_matter(
  tmp_path, write_run
):
  weights = write_run(tmp_path / 'first', CONFIG)
  head = weights['head'].copy()
  head[:, 407:] = np.nan
  write_run(tmp_path / 'run', CONFIG, head=head)
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  assert np.isfinite(load_folder(tmp_path / 'out')['lm_head.weight']).all()


def test_a_value_beyond_float16_is_named(tmp_path, write_run):
  weights = write_run(tmp_path / 'first', CONFIG)
  large = weights['blocks/attention/q'].copy()
  large[0, 0, 0] = 65520  # rounds to infinity; 65519 would to 65504
  write_run(tmp_path / 'run', CONFIG, **{'blocks/attention/q': large})
  with pytest.raises(UserError, match=r'layers\.0\.self_attn\.q.*float16'):
    to_hf.to_hf(tmp_path / 'run', tmp_path / 'out', 'float16')
  assert files_in(tmp_path) == {'first', 'run'}
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out', 'bfloat16')


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, write_run):
  write_run(tmp_path / 'run', change(vocab_size=399))
  with pytest.raises(UserError, match='400 ids.*vocab_size=399'):
    to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')


@pytest.mark.parametrize('make', ['mkdir', 'touch', 'symlink_to'])
def test_a_target_that_exists_is_refused_first(tmp_path, make):
  target = tmp_path / 'out'
  getattr(target, make)(*(['nowhere'] if make == 'symlink_to' else []))
  with pytest.raises(UserError, match='out exists'):
    to_hf.to_hf(tmp_path / 'no source', target)


def test_a_target_on_a_bucket_is_refused(tmp_path):
  with pytest.raises(UserError, match='gs://b/out is not a local folder'):
    to_hf.to_hf(tmp_path / 'no source', 'gs://b/out')


def test_a_target_below_a_file_is_refused(tmp_path, write_run):
  write_run(tmp_path / 'run', CONFIG)
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='file/out: cannot write'):
    to_hf.to_hf(tmp_path / 'run', tmp_path / 'file' / 'out')


def test_a_source_that_is_no_checkpoint_is_refused(tmp_path):
  with pytest.raises(UserError, match='no source does not exist'):
    to_hf.to_hf(tmp_path / 'no source', tmp_path / 'out')
  (tmp_path / 'folder').mkdir()
  with pytest.raises(UserError, match='folder is neither'):
    to_hf.to_hf(tmp_path / 'folder', tmp_path / 'out')
  assert files_in(tmp_path) == {'folder'}


def test_damaged_weights_are_named(tmp_path, write_run):
  write_run(tmp_path / 'run', CONFIG)
  for chunk in (tmp_path / 'run/state/model.blocks.mlp.up').glob('0.*'):
    chunk.write_bytes(b'not a chunk')
  with pytest.raises(
    UserError, match='run: model/blocks/mlp/up cannot be read'
  ):
    to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  assert files_in(tmp_path) == {'run'}


# Exports slowly, again after an interruption; says when weights are written.
SLOWLY = """
import sys, time
from grit_jax.convert import to_hf
cast = to_hf._cast
def slow(*arguments):
  print('writing', flush=True)
  time.sleep(0.2)
  return cast(*arguments)
to_hf._cast = slow
try:
  to_hf.to_hf(sys.argv[1], sys.argv[2])
except KeyboardInterrupt:
  print('interrupted', flush=True)
else:
  sys.exit('it was not interrupted')
sys.stdin.readline()
to_hf.to_hf(sys.argv[1], sys.argv[2])
"""


def test_a_stopped_export_leaves_nothing_that_hinders_the_next(
  tmp_path, write_run
):
  write_run(tmp_path / 'run', CONFIG)
  process = subprocess.Popen(
    [sys.executable, '-c', SLOWLY, tmp_path / 'run', tmp_path / 'out'],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:

    def send(number: int) -> None:
      for _ in range(2):
        assert process.stdout.readline() == 'writing\n'
      assert files_in(tmp_path) == {'run', '.out.partial'}
      process.send_signal(number)

    # An interrupted one clears away what it has written,
    send(signal.SIGINT)
    while (line := process.stdout.readline()) == 'writing\n':
      pass
    assert line == 'interrupted\n'
    assert files_in(tmp_path) == {'run'}
    process.stdin.write('go on\n')
    process.stdin.flush()
    # a killed one cannot, and the next does.
    send(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  assert files_in(tmp_path) == {'run', '.out.partial'}
  (tmp_path / '.out.partial' / 'stale').touch()
  to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  assert files_in(tmp_path) == {'run', 'out'}
  assert 'stale' not in files_in(tmp_path / 'out')


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, write_run):
  write_run(tmp_path / 'run', CONFIG)
  message = f'^{tmp_path}/out: cannot write: File too large'
  with limit_file_sizes(100_000), pytest.raises(UserError, match=message):
    to_hf.to_hf(tmp_path / 'run', tmp_path / 'out')
  assert files_in(tmp_path) == {'run'}
