"""Exports of adapters: in PEFT on the Hugging Face base, and merged."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import grain
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from grit_jax import sharding
from grit_jax.batch import Rows
from grit_jax.checkpoint import Checkpoints
from grit_jax.config import Config, DataConfig, LoraConfig, MeshConfig
from grit_jax.convert.hf_folder import HfFolder
from grit_jax.convert.to_hf import to_hf
from grit_jax.convert.to_peft import to_peft
from grit_jax.errors import UserError
from grit_jax.initial import (
  describe_base,
  load_model,
  load_unmerged,
  open_initial,
)
from grit_jax.models import presets
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Decoder
from grit_jax.models.lora import add_adapters, split_trained

# Two float32 programs over three layers; logits of size 1 to 10, and merged
# weights rounded once more.
TOLERANCE = 1e-4
# A merged weight is one product of float32 numbers away from its factors.
MERGED_TOLERANCE = 1e-5
# What adapters change is far above it.
CHANGE = 1e-2

LENGTH = 12
KINDS = {
  'llama': {},
  'mixtral': {
    'architectures': ['MixtralForCausalLM'],
    'model_type': 'mixtral',
    'num_local_experts': 4,
    'num_experts_per_tok': 2,
    'sliding_window': None,
  },
}
TARGETS = {'all': LoraConfig().targets, 'attention': 'q,v'}


def make_mesh() -> jax.sharding.Mesh:
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def runs(tmp_path_factory, write_hf: Callable) -> Callable[..., tuple]:
  """The folder of a base, and the workdir of adapters for it, once each."""
  root = tmp_path_factory.mktemp('adapters')

  def make(kind: str, targets: str = 'all') -> tuple:
    base, workdir = root / kind, root / f'{kind}-{targets}'
    if not base.exists():
      write_hf(base, **KINDS[kind])
    if not workdir.exists():
      write_adapters(base, workdir, TARGETS[targets])
    return base, workdir

  return make


def write_adapters(
  base: pathlib.Path, workdir: pathlib.Path, targets: str, **named: str
) -> None:
  """Writes a run's checkpoint, with random numbers for what it trained."""
  initial = open_initial(base)
  lora = LoraConfig(rank=3, alpha=6.0, targets=targets, base='float32')
  model = dataclasses.replace(initial.model, dtype='float32')
  config = Config(
    model=model,
    lora=lora,
    data=DataConfig(paths='pairs.jsonl'),
    init_from=str(base),
  )
  rng = np.random.default_rng(1)

  def draw() -> Decoder:
    key = jax.random.key(0)
    return split_trained(add_adapters(Decoder(model, key), lora, key))[0]

  with jax.set_mesh(make_mesh()):
    trained = jax.tree.map(
      lambda x: 0.3 * rng.standard_normal(x.shape, np.float32),
      jax.eval_shape(draw),
    )
    with Checkpoints(workdir, 1) as checkpoints:
      checkpoints.save(
        7,
        {'model': trained},
        iter(grain.MapDataset.range(9).to_iter_dataset()),
        dataclasses.asdict(config),
        initial.tokenizer.files,
        {},
        describe_base(initial) | named,
      )


def draw_tokens() -> np.ndarray:
  return np.random.default_rng(0).integers(3, 400, size=(4, LENGTH))


@jax.jit
def run_rows(model: Decoder, rows: Rows) -> tuple[jax.Array, jax.Array]:
  [states] = model([rows], [Kind.CAUSAL])
  return model.logits(states, model.gather_head()), states.mean(axis=1)


def run_ours(model: Decoder) -> tuple[np.ndarray, np.ndarray]:
  """Logits, and the mean of the last states, of four texts."""
  mesh = jax.sharding.get_mesh()
  tokens = draw_tokens().astype(np.int32)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (4, 1))
  rows = Rows(tokens, np.ones_like(tokens), positions, tokens < 0)
  rows = jax.tree.map(lambda x: sharding.place(mesh, x, 'rows', 'seq'), rows)
  logits, embeddings = run_rows(model, rows)
  return np.asarray(logits)[..., : model.config.vocab_size], np.asarray(
    embeddings
  )


@functools.cache
def run_unmerged(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  with jax.set_mesh(make_mesh()):
    return run_ours(load_unmerged(open_initial(workdir)))


def run_theirs(model) -> tuple[np.ndarray, np.ndarray]:
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    out = model(torch.tensor(draw_tokens()), output_hidden_states=True)
  return out.logits.numpy(), out.hidden_states[-1].mean(dim=1).numpy()


@pytest.mark.parametrize(
  ('kind', 'targets'),
  [('llama', 'all'), ('llama', 'attention'), ('mixtral', 'all')],
)
def test_peft_on_the_base_gives_our_logits_and_embeddings(
  runs, tmp_path, kind, targets
):
  transformers = pytest.importorskip('transformers')
  peft = pytest.importorskip('peft')
  base, workdir = runs(kind, targets)
  to_peft(workdir, tmp_path / 'peft')
  settings = json.loads((tmp_path / 'peft/adapter_config.json').read_text())
  assert settings['base_model_name_or_path'] == str(base)
  load = transformers.AutoModelForCausalLM.from_pretrained
  plain = load(base, dtype='float32').eval()
  before = run_theirs(plain)
  adapted = peft.PeftModel.from_pretrained(plain, tmp_path / 'peft').eval()
  found = run_theirs(adapted)
  expected = run_unmerged(workdir)
  for ours, theirs, unadapted in zip(expected, found, before, strict=True):
    scale = np.abs(ours).max()
    np.testing.assert_allclose(theirs, ours, atol=TOLERANCE * scale)
    assert np.abs(unadapted - ours).max() > CHANGE * scale


@pytest.mark.parametrize('kind', ['llama', 'mixtral'])
def test_the_merged_export_gives_our_logits_and_embeddings(
  runs, tmp_path, kind
):
  transformers = pytest.importorskip('transformers')
  _, workdir = runs(kind)
  to_hf(workdir, tmp_path / 'hf')
  # Nothing in it needs the base, or says that it has adapters.
  assert HfFolder(tmp_path / 'hf').config.lora == LoraConfig()
  load = transformers.AutoModelForCausalLM.from_pretrained
  found = run_theirs(load(tmp_path / 'hf', dtype='float32').eval())
  expected = run_unmerged(workdir)
  for ours, theirs in zip(expected, found, strict=True):
    scale = np.abs(ours).max()
    np.testing.assert_allclose(theirs, ours, atol=TOLERANCE * scale)


@pytest.mark.parametrize('kind', ['llama', 'mixtral'])
def test_a_model_that_is_merged_as_it_is_read_is_the_unmerged_one(runs, kind):
  base, workdir = runs(kind)
  initial, expected = open_initial(workdir), run_unmerged(workdir)
  with jax.set_mesh(make_mesh()):
    key = jax.random.key(0)
    found = run_ours(load_model(initial.config, initial, key))
    plain = run_ours(load_model(initial.config, open_initial(base), key))
  for merged, ours, unadapted in zip(found, expected, plain, strict=True):
    scale = np.abs(ours).max()
    np.testing.assert_allclose(merged, ours, atol=MERGED_TOLERANCE * scale)
    assert np.abs(unadapted - ours).max() > CHANGE * scale


def test_factors_are_written_as_they_are_saved(runs, tmp_path):
  _, workdir = runs('mixtral')
  to_peft(workdir, tmp_path / 'peft', base='a/name')
  found = load_file(tmp_path / 'peft/adapter_model.safetensors')
  # Four of attention and three of each of four experts, in three layers.
  assert len(found) == 2 * 3 * (4 + 3 * 4)
  initial = open_initial(workdir)
  a = initial.adapters.open_array('model/blocks/moe/adapters/down/a')
  name = 'base_model.model.model.layers.2.block_sparse_moe.experts.1.w2.lora_A'
  np.testing.assert_array_equal(
    found[f'{name}.weight'], a[2, 1].read().result().T
  )
  settings = json.loads((tmp_path / 'peft/adapter_config.json').read_text())
  assert settings['base_model_name_or_path'] == 'a/name'
  assert (settings['r'], settings['lora_alpha']) == (3, 6.0)


def test_a_run_without_adapters_is_refused(write_run, tmp_path):
  model = dataclasses.replace(presets.tiny(), vocab_size=407)
  write_run(tmp_path / 'run', Config(model=model))
  with pytest.raises(UserError, match=r'has no adapters: .* to_hf'):
    to_peft(tmp_path / 'run', tmp_path / 'peft')
  assert not (tmp_path / 'peft').exists()


def test_adapters_that_are_their_own_base_are_refused(runs, tmp_path):
  base, _ = runs('llama')
  # One names the other, which names the first.
  for name, other in ('one', 'two'), ('two', 'one'):
    write_adapters(
      base, tmp_path / name, 'all', init_from=str(tmp_path / other)
    )
  with pytest.raises(UserError, match='one.*: the adapters are their own base'):
    open_initial(tmp_path / 'one')
