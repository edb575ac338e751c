"""Runs what the page tells a newcomer to run."""

import pathlib
import re
import shlex

import pytest

from grit_jax import config as configuration

ROOT = pathlib.Path(__file__).parents[2]
# How the page's commands end on a pod whose `python` is one that fails.
STATUS = {'keep.sh': 1}


def read_commands() -> list[list[str]]:
  """Returns the words of the commands in the page's blocks of code."""
  text = (ROOT / 'launch' / 'README.md').read_text()
  blocks = re.findall(r'^```bash\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
  lines = ''.join(blocks).replace('\\\n', '').splitlines()
  return [shlex.split(line) for line in lines]


def test_scripts_for_tpu_vms_take_the_commands_as_they_stand(cloud):
  text = (ROOT / 'launch' / 'README.md').read_text()
  commands = [
    words for words in read_commands() if words[0].startswith('launch/tpu_vm/')
  ]
  # These two stand in the text.
  for script in 'stop.sh', 'delete.sh':
    assert f'{script} POD ZONE`' in text
    commands.append([f'launch/tpu_vm/{script}', 'POD', 'ZONE'])
  scripts = [pathlib.Path(words[0]).name for words in commands]
  assert scripts == [
    'create.sh', 'setup.sh', 'run.sh', 'logs.sh', 'keep.sh', 'stop.sh',
    'delete.sh',
  ]  # fmt: skip
  for script, words in zip(scripts, commands, strict=True):
    words = [{'POD': 'pod', 'ZONE': 'zone'}.get(word, word) for word in words]
    output = cloud.run(script, *words[1:], status=STATUS.get(script, 0))
    assert 'launch/tpu_vm/' + script + ' NAME' not in output
  assert not cloud.homes()


@pytest.mark.parametrize(
  'words',
  [words for words in read_commands() if 'grit_jax.train' in words],
  ids=lambda words: words[0],
)
def test_training_commands_have_keys_that_there_are(words):
  values = configuration.to_config_dict(configuration.Config())
  flags = [word for word in words if word.startswith('--config.')]
  assert len(flags) == 2
  for flag in flags:
    key, _, value = flag.removeprefix('--config.').partition('=')
    values.update_from_flattened_dict({key: value})
  configuration.resolve(values)


def test_every_script_is_on_the_page():
  text = (ROOT / 'launch' / 'README.md').read_text()
  for path in (ROOT / 'launch').glob('*/*'):
    if path.is_file() and path.name != 'pod.sh':
      assert path.name in text, path
