"""Runs what the page tells a newcomer to run."""

import pathlib
import re
import shlex
import subprocess

import pytest

from grit_jax import config as configuration

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / 'launch' / 'README.md').read_text()
BLOCKS = re.findall(r'^```bash\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)
# How the page's commands end on a pod whose `python` has no grit_jax.
STATUS = {'keep.sh': 1}


def read_lines(start: str) -> list[str]:
  """Returns the lines of the page's blocks that begin so."""
  lines = ''.join(BLOCKS).replace('\\\n', '').splitlines()
  return [line for line in lines if line.startswith(start)]


def read_training_command() -> str:
  """Returns the definition of `command`, which other lines use."""
  [command] = re.findall(r'^command=\(.*?\)$', ''.join(BLOCKS), re.S | re.M)
  return command


def test_scripts_for_tpu_vms_take_the_commands_as_they_stand(cloud):
  lines = read_lines('launch/tpu_vm/')
  # These two stand in the text.
  for script in 'stop.sh', 'delete.sh':
    assert f'{script} POD ZONE`' in PAGE
    lines.append(f'launch/tpu_vm/{script} POD ZONE')
  scripts = [pathlib.Path(line.split()[0]).name for line in lines]
  assert scripts == [
    'create.sh', 'setup.sh', 'run.sh', 'logs.sh', 'keep.sh', 'stop.sh',
    'delete.sh',
  ]  # fmt: skip
  for script, line in zip(scripts, lines, strict=True):
    line = line.replace('POD ZONE', 'pod zone')
    result = subprocess.run(
      ['bash', '-c', f'{read_training_command()}\n{line}'],
      cwd=cloud.clone,
      env=cloud.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert result.returncode == STATUS.get(script, 0), result.stdout
    assert f'{script} NAME' not in result.stdout
    if script == 'run.sh':
      # All of the command arrives.
      sent = cloud.calls('tpu-vm', 'ssh')[-1][3]
      assert '--workdir=gs://BUCKET/run' in sent
  assert not cloud.homes()


@pytest.mark.parametrize(
  'command',
  [read_training_command(), *read_lines('sbatch')],
  ids=['pod', 'slurm'],
)
def test_training_commands_have_keys_that_there_are(command):
  values = configuration.to_config_dict(configuration.Config())
  words = shlex.split(command.removeprefix('command=(').removesuffix(')'))
  flags = [word for word in words if word.startswith('--config.')]
  assert len(flags) >= 2
  for flag in flags:
    key, _, value = flag.removeprefix('--config.').partition('=')
    values.update_from_flattened_dict({key: value})
  configuration.resolve(values)


def test_every_script_is_on_the_page():
  for path in (ROOT / 'launch').glob('*/*'):
    if path.is_file() and path.name != 'pod.sh':
      assert path.name in PAGE, path
