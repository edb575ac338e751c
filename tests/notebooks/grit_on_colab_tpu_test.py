"""The Colab notebook, executed top to bottom on a CPU with small settings."""

import base64
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from grit_jax import GritLM

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / 'notebooks' / 'grit_on_colab_tpu.ipynb'
PNG = b'\x89PNG'
SCREEN = 30  # lines
SECONDS = 600  # a cell, on a machine with much else to do
STEPS = 2
# Cells that the test adds, by the cell that they come after.
CHECKS = {
  # A chip that the notebook's own process has is one that training cannot have.
  # And the picture that is drawn last has all steps.
  'train': """
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
figure = draw_losses()
for axes in figure.axes:
  [line] = axes.lines
  assert [*line.get_xdata()] == [*range(1, STEPS + 1)]
  assert all(value > 0 for value in line.get_ydata())
display(figure)
""",
  # The model was trained between the two.
  'embed': """
for one, other in zip(before, after, strict=True):
  assert one.shape == other.shape == (len(held_out), config.model.embed_dim)
  assert abs(one - other).max() > 1e-4
""",
}
# Both are in float32, and the rows that a text is encoded in are the same.
EXPORT_TOLERANCE = 1e-5

DATA = {
  'embedding_batch': 8,
  'generative_batch': 8,
  'max_query_tokens': 128,
  'max_passage_tokens': 128,
  'max_generative_tokens': 128,
  'row_length': 128,
}
# Of a model of these sizes, as flags and as a Hugging Face folder has them.
SIZES = {
  'embed_dim': 48,
  'num_layers': 1,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 16,
  'mlp_dim': 64,
}
BASE = {
  'architectures': ['MistralForCausalLM'],
  'model_type': 'mistral',
  'hidden_size': 48,
  'num_hidden_layers': 1,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 16,
  'intermediate_size': 64,
  'rope_theta': 10000.0,
  'max_position_embeddings': 32768,
}


def to_flags(group: str, values: Mapping[str, Any]) -> str:
  return shlex.join(
    f'--config.{group}.{name}={value}' for name, value in values.items()
  )


def set_parameters(notebook: Any, values: Mapping[str, Any]) -> None:
  """Replaces the values in the cell of parameters, as its form does."""
  [cell] = [
    cell
    for cell in notebook.cells
    if 'parameters' in cell.metadata.get('tags', ())
  ]
  lines = cell.source.split('\n')
  for name, value in values.items():
    [place] = [
      i for i, line in enumerate(lines) if line.startswith(f'{name} = ')
    ]
    _, _, form = lines[place].partition('  # @param ')
    lines[place] = f'{name} = {value!r}  # @param {form}'
  cell.source = '\n'.join(lines)


def execute(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, **values: Any
) -> dict[str, Any]:
  """Executes the notebook in a folder; returns its code cells by their id."""
  # The kernel imports the package of this tree.
  monkeypatch.setenv('PYTHONPATH', ':'.join([str(ROOT), *sys.path]))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  small = {
    'SOURCE': str(ROOT),
    'WORKDIR': str(folder / 'run'),
    'STEPS': STEPS,
    'FUNCTIONS': 40,
    'HELD_OUT': 8,
    'ANSWER_TOKENS': 2,
    'COPY_TO': str(folder / 'copy'),
  }
  set_parameters(notebook, small | values)
  for place, cell in reversed([*enumerate(notebook.cells)]):
    if cell.id in CHECKS:
      check = nbformat.v4.new_code_cell(CHECKS[cell.id], id=f'check-{cell.id}')
      notebook.cells.insert(place + 1, check)
  nbclient.NotebookClient(
    notebook, timeout=SECONDS, resources={'metadata': {'path': str(folder)}}
  ).execute()
  return {cell.id: cell for cell in notebook.cells if cell.cell_type == 'code'}


def read_pictures(cell: Any) -> list[bytes]:
  return [
    base64.b64decode(output.data['image/png'])
    for output in cell.outputs
    if output.output_type == 'display_data' and 'image/png' in output.data
  ]


def read_text(cell: Any) -> str:
  return ''.join(
    output.text for output in cell.outputs if output.output_type == 'stream'
  )


def check_run(folder: pathlib.Path, cells: Mapping[str, Any]) -> None:
  """Checks what both ways through the notebook show and leave."""
  [plane] = read_pictures(cells['plot-embeddings'])
  assert plane.startswith(PNG) and len(plane) > 10_000
  [losses] = read_pictures(cells['train'])
  assert losses.startswith(PNG)
  assert [losses] == read_pictures(cells['check-train'])
  assert (folder / 'run' / 'checkpoints' / str(STEPS)).is_dir()
  rows = [line.split()[0] for line in read_text(cells['compare']).splitlines()]
  assert rows[1:] == ['random', 'TF-IDF', 'before', 'after']
  model = GritLM.load(folder / 'run')
  copy = GritLM.load(folder / 'copy' / 'to_hf', dtype=model.config.model.dtype)
  texts = ['def one():\n  return 1', 'Two texts']
  np.testing.assert_allclose(
    copy.encode(texts), model.encode(texts), atol=EXPORT_TOLERANCE
  )


@pytest.mark.e2e
def test_the_quickstart_runs_from_top_to_bottom(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  flags = [
    to_flags('model', SIZES),
    to_flags('data', DATA | {'tokenizer_pieces': 400}),
  ]
  cells = execute(
    tmp_path, monkeypatch, RUN='quickstart', FLAGS=' '.join(flags)
  )
  check_run(tmp_path, cells)


@pytest.mark.e2e
def test_adapters_run_from_top_to_bottom(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, write_hf: Callable
):
  write_hf(tmp_path / 'base', **BASE)
  flags = [
    to_flags('model', SIZES | {'vocab_size': 407, 'dtype': 'float32'}),
    to_flags('data', DATA),
    to_flags('optimizer', {'learning_rate': 1e-2}),
  ]
  cells = execute(
    tmp_path,
    monkeypatch,
    RUN='lora_7b',
    BASE=str(tmp_path / 'base'),
    FLAGS=' '.join(flags),
  )
  check_run(tmp_path, cells)
  assert (tmp_path / 'copy' / 'to_peft' / 'adapter_config.json').exists()


def test_the_notebook_is_as_it_is_committed():
  notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  for cell in notebook.cells:
    assert len(cell.source.splitlines()) <= SCREEN, cell.id
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None, cell.id
