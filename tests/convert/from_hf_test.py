"""Tests of the conversion into a checkpoint, and of its command."""

import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest
from file_sizes import limit_file_sizes

from grit_jax import config as configuration
from grit_jax.batch import Rows
from grit_jax.checkpoint import find_checkpoint, flatten
from grit_jax.convert import __main__ as command
from grit_jax.convert import keys
from grit_jax.convert.from_hf import from_hf
from grit_jax.convert.hf_folder import HfFolder
from grit_jax.errors import ConfigError, UserError
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Decoder

ROOT = pathlib.Path(__file__).parents[2]
# Three float32 layers and a head against another implementation's.
LOGIT_TOLERANCE = 1e-4

LLAMA3 = {
  'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
  'high_freq_factor': 4.0, 'original_max_position_embeddings': 16,
}  # fmt: skip
FOLDERS = {
  'llama': {},
  'tied': {'tie_word_embeddings': True},
  'linear': {'rope_scaling': {'rope_type': 'linear', 'factor': 3.0}},
  'llama3': {'rope_scaling': LLAMA3},
  'mistral': {'model_type': 'mistral', 'sliding_window': None},
  'mixtral': {
    'model_type': 'mixtral', 'num_local_experts': 5, 'num_experts_per_tok': 2,
    'intermediate_size': 20,
  },
}  # fmt: skip


def restore(folder: pathlib.Path) -> Decoder:
  """The decoder of a checkpoint, on the current mesh, computing in float32."""
  checkpoint = find_checkpoint(folder)
  values = checkpoint.read_config()
  values['model']['dtype'] = 'float32'
  model = configuration.from_dict(values).model
  abstract = jax.eval_shape(lambda: Decoder(model, jax.random.key(0)))
  return checkpoint.restore({'model': abstract})['model']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', FOLDERS)
def test_the_checkpoint_has_the_folders_weights_bitwise(
  tmp_path, write_hf: Callable, mesh_of: Callable, name: str, dtype: str
):
  write_hf(tmp_path / 'hf', dtype, shards=2, **FOLDERS[name])
  from_hf(tmp_path / 'hf', tmp_path / 'checkpoint')
  folder = HfFolder(tmp_path / 'hf')
  # Its sizes are odd: one device alone can hold them.
  with jax.set_mesh(mesh_of(1, 1, 1)):
    weights = flatten(restore(tmp_path / 'checkpoint'))
  shapes = {path: weight.shape for path, weight in weights.items()}
  assert shapes == keys.weight_shapes(folder.model)
  for tensor in folder.tensors:
    shape = keys.slice_shape(tensor, folder.model)
    expected = folder.read(tensor, tuple(slice(0, size) for size in shape))
    found = np.asarray(weights[tensor.path])[tensor.index]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.view('u1'), expected.view('u1'))
  checkpoint = find_checkpoint(tmp_path / 'checkpoint')
  assert checkpoint.read_tokenizer() == folder.tokenizer.files
  assert configuration.from_dict(checkpoint.read_config()) == folder.config


@jax.jit
def score(model: Decoder, rows: Rows) -> jax.Array:
  [hidden] = model([rows], [Kind.CAUSAL])
  return model.logits(hidden, model.gather_head())


@pytest.mark.parametrize(
  'names', [['linear'], ['llama3'], ['tied', 'mistral'], ['mixtral']]
)
def test_logits_of_the_checkpoint_are_transformers(
  tmp_path, write_hf: Callable, mesh_of: Callable, names: list[str]
):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  changes = {key: x for name in names for key, x in FOLDERS[name].items()}
  write_hf(tmp_path / 'hf', **changes)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'hf', dtype='float32', attn_implementation='eager'
  ).eval()
  # Past the 16 positions that llama3's frequencies are scaled from.
  tokens = np.random.default_rng(0).integers(400, size=(2, 50)).astype('int32')
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens.astype('int64'))).logits.numpy()
  from_hf(tmp_path / 'hf', tmp_path / 'checkpoint')
  rows = Rows(
    tokens,
    np.ones_like(tokens),
    np.broadcast_to(np.arange(50, dtype='int32'), tokens.shape),
    np.zeros(tokens.shape, bool),
  )
  with jax.set_mesh(mesh_of(1, 1, 1)):
    logits = np.asarray(score(restore(tmp_path / 'checkpoint'), rows))
  np.testing.assert_allclose(logits[:, :, :407], expected, atol=LOGIT_TOLERANCE)
  assert np.abs(expected).max() > 1


def test_an_existing_target_is_refused_and_left_alone(
  tmp_path, write_hf: Callable
):
  write_hf(tmp_path / 'hf')
  (tmp_path / 'target').write_text('mine')
  with pytest.raises(UserError, match='target exists: remove it'):
    from_hf(tmp_path / 'hf', tmp_path / 'target')
  assert (tmp_path / 'target').read_text() == 'mine'


def run(*flags: str) -> None:
  """Runs the command in this process."""
  command.convert(command.make_parser().parse_args([*flags]))


def start(*flags: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-m', 'grit_jax.convert', *flags],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_the_command_converts_both_ways(tmp_path, write_hf: Callable, capfd):
  write_hf(tmp_path / 'hf')
  run('from_hf', f'--source={tmp_path}/hf', f'--target={tmp_path}/checkpoint')
  assert 'WARNING' not in capfd.readouterr().err
  process = start(
    'to_hf', f'--source={tmp_path}/checkpoint', f'--target={tmp_path}/again'
  )
  _, output = process.communicate()
  assert process.returncode == 0, output
  assert f'{tmp_path}/again is written' in output
  assert 'WARNING' not in output and 'orbax' not in output
  first, second = HfFolder(tmp_path / 'hf'), HfFolder(tmp_path / 'again')
  assert first.tensors == second.tensors and first.model == second.model


def test_a_mistake_ends_in_one_message(tmp_path, write_hf: Callable, capfd):
  write_hf(tmp_path / 'hf')
  path = tmp_path / 'hf' / 'config.json'
  config = json.loads(path.read_text()) | {'hidden_act': 'gelu'}
  path.write_text(json.dumps(config))
  with pytest.raises(UserError) as stopped:
    run('from_hf', f'--source={tmp_path}/hf', f'--target={tmp_path}/target')
  message = str(stopped.value)
  assert '\n' not in message
  assert message.startswith(f'{tmp_path}/hf/config.json: hidd')
  assert [path.name for path in tmp_path.iterdir()] == ['hf']
  # Nothing else is shown.
  assert not capfd.readouterr().err
  with pytest.raises(ConfigError, match='--target'):
    run('from_hf', '--source=x')


# Of Orbax, which the command hushes too.
@pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')
def test_a_full_disk_leaves_nothing(tmp_path, write_hf: Callable):
  write_hf(tmp_path / 'hf')
  with limit_file_sizes(40_000), pytest.raises(UserError) as stopped:
    run('from_hf', f'--source={tmp_path}/hf', f'--target={tmp_path}/target')
  message = str(stopped.value)
  assert message.startswith(f'{tmp_path}/target cannot be')
  assert 'File too large' in message and '\n' not in message
  assert [path.name for path in tmp_path.iterdir()] == ['hf']


def test_an_interrupted_conversion_leaves_nothing(tmp_path, write_hf: Callable):
  # Of enough weights to be interrupted in one of them.
  write_hf(tmp_path / 'hf', num_hidden_layers=96, intermediate_size=500)
  process = start(
    'from_hf', f'--source={tmp_path}/hf', f'--target={tmp_path}/target'
  )
  with process:
    seen = ''
    while 'MB' not in seen:
      seen += process.stderr.read(1)
      assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    output = seen + process.stderr.read()
  assert process.returncode == 128 + signal.SIGINT, output
  assert f'stopped; {tmp_path}/target is not written' in output
  for word in 'Traceback', 'WARNING', 'orbax':
    assert word not in output
  assert [path.name for path in tmp_path.iterdir()] == ['hf']


@pytest.mark.parametrize(
  ('text', 'size'), [('5GB', 5 * 10**9), ('1.5 mb', 1_500_000), ('7B', 7)]
)
def test_sizes_are_read(text: str, size: int):
  assert command.parse_size(text) == size


@pytest.mark.parametrize(
  'text', ['5', 'GB', '-1GB', '5GiB', '0MB', '9' * 400 + 'GB']
)
def test_what_is_no_size_is_refused(text: str):
  with pytest.raises(command.argparse.ArgumentTypeError, match='is not a size'):
    command.parse_size(text)
