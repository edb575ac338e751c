"""A byte that is flipped in any file of ours does not go unseen."""

import json
import pathlib
import re
import shutil
from collections.abc import Callable

import grain
import pytest

from grit_jax import metrics
from grit_jax.checkpoint import Checkpoint, find_checkpoint
from grit_jax.convert.to_hf import to_hf
from grit_jax.data.tokenizer import load_tokenizer
from grit_jax.errors import UserError
from grit_jax.initial import open_initial
from grit_jax.resume import check_same_tokenizer

# Files whose content no reader of ours takes anything from, or whose content
# cannot be known; why.
EXCEPTIONS = {
  'run/config.json': 'a copy for people; a checkpoint has its own',
  'run/evaluation.json': 'figures, with no checksum; what is no JSON is named',
  'run/metrics.jsonl': 'each step adds a line; what is no JSON, no object or '
  'without a step is named',
  'run/loss.png': 'a picture for people',
  'run/tensorboard': 'for TensorBoard, which has checksums of its own',
  'run/.lock': 'says who held the workdir last',
  'run/data': 'tokenized data, which is made again from its source',
  'export/README.md': 'for people, who edit it',
}


def flip(path: pathlib.Path) -> bytes:
  """Flips the lowest bit of a file's middle byte; returns what it was."""
  content = path.read_bytes()
  middle = len(content) // 2
  changed = bytearray(content)
  changed[middle] ^= 1
  path.write_bytes(changed)
  return content


def complaint(read: Callable[[], object]) -> str:
  try:
    read()
  except UserError as error:
    return str(error)
  return ''


def find_unseen(folder: pathlib.Path, read: Callable[[], object]) -> list[str]:
  """Flips a byte in each file; returns those of which nobody complains.

  A file that is of no use to the reader is none of them: without it all is
  read as before.
  """
  read()
  unseen = []
  for path in sorted(folder.rglob('*')):
    name = f'{folder.name}/{path.relative_to(folder)}'
    excepted = any(f'{name}/'.startswith(f'{known}/') for known in EXCEPTIONS)
    if excepted or not path.is_file() or not path.stat().st_size:
      continue
    content = flip(path)
    if str(folder) not in complaint(read):
      path.unlink()
      if complaint(read):
        unseen.append(name)
    path.write_bytes(content)
  read()
  return unseen


def nest(types: dict) -> dict:
  nested = {}
  for path, array in types.items():
    *groups, name = path.split('/')
    inner = nested
    for group in groups:
      inner = inner.setdefault(group, {})
    inner[name] = array
  return nested


def test_every_file_of_a_checkpoint(trained, tmp_path):
  newest = find_checkpoint(trained.workdir).folder
  folder = shutil.copytree(newest, tmp_path / 'checkpoint')
  types = nest(Checkpoint(folder).types())

  def read() -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.read_config()
    checkpoint.read_tokenizer()
    iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpoint.restore(types, iterator)

  assert not find_unseen(folder, read)


def test_a_number_that_is_another_in_a_file_of_json(trained, tmp_path):
  newest = find_checkpoint(trained.workdir).folder
  types = nest(Checkpoint(newest).types())
  for name in 'data/process_0-of-1.json', 'config/config.json':
    folder = shutil.copytree(newest, tmp_path / name.partition('/')[0])
    path = folder / name
    # It stays what it was to everybody but a checksum.
    path.write_text(re.sub('[1-8]', '9', path.read_text(), count=1))
    checkpoint = Checkpoint(folder)
    iterator = iter(grain.MapDataset.range(99).to_iter_dataset())
    with pytest.raises(UserError, match=f'{folder}: the item .* is damaged'):
      checkpoint.read_config()
      checkpoint.restore(types, iterator)


def test_every_other_file_of_a_workdir(trained, tmp_path):
  folder = shutil.copytree(trained.workdir, tmp_path / 'run')
  checkpoint = find_checkpoint(trained.workdir)
  shutil.rmtree(folder / 'checkpoints')

  def read() -> None:
    check_same_tokenizer(load_tokenizer(folder / 'tokenizer.model'), checkpoint)

  assert not find_unseen(folder, read)


def test_every_file_of_an_export(trained, tmp_path):
  folder = tmp_path / 'export'
  to_hf(trained.workdir, folder)
  assert not find_unseen(folder, lambda: open_initial(folder).verify())


def test_a_checkpoint_that_is_read_part_by_part(trained, tmp_path):
  """As to be exported, encoded with or trained from."""
  folder = shutil.copytree(trained.workdir, tmp_path / 'run')
  arrays = pathlib.Path(find_checkpoint(folder).folder) / 'state'
  seen = 0
  # One of them has the model's arrays.
  for path in sorted(arrays.rglob('d/*')):
    content = flip(path)
    if ' is damaged' in complaint(lambda: open_initial(folder).verify()):
      seen += 1
      with pytest.raises(UserError, match=f'{folder}.*model/.* is damaged'):
        to_hf(folder, tmp_path / 'export')
    path.write_bytes(content)
  assert seen


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"step": 3, "loss": 1.0', 'metrics.jsonl:3 is not JSON'),
    ('[3]', 'metrics.jsonl:3 has no step'),
    ('{"loss": 1.0}', 'metrics.jsonl:3 has no step'),
    ('{"step": "3"}', 'metrics.jsonl:3 has no step'),
  ],
)
def test_a_metrics_line_that_is_none_is_named_and_the_run_goes_on(
  tmp_path, caplog, line, message
):
  path = tmp_path / 'metrics.jsonl'
  lines = [json.dumps({'step': step, 'loss': 1.0}) for step in range(1, 6)]
  lines[2] = line
  path.write_text('\n'.join(lines))
  with metrics.MetricsWriter(tmp_path, 5, 6) as writer:
    writer.write(6, {'loss': 0.5})
  assert message in caplog.text
  found = [json.loads(line)['step'] for line in path.read_text().splitlines()]
  assert found == [1, 2, 4, 5, 6]
  metrics.plot_losses(tmp_path)
