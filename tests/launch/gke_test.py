"""Runs the script for GKE against a `kubectl` that keeps what it gets."""

import math
import os
import pathlib
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
# Spaces, quotes, what YAML or Kubernetes would change, and a placeholder.
ARGUMENTS = [
  '--config=a b.py', "it's", '"two"', 'back\\slash', '$(HOME)', '$$', '# no',
  'a: b', '[1]', '', 'line\nline\ttab', '$NAME', '&',
]  # fmt: skip
# Machines that GKE has: the label of the chip and its topologies' sides.
CHIPS = {
  'v5e': ('tpu-v5-lite-podslice', '8x8'),
  'v5p': ('tpu-v5p-slice', '2x4x4'),
  'v6e': ('tpu-v6e-slice', '4x8'),
}
NAMES = ('run', 'us-docker.pkg.dev/p/r/grit_jax:1')


class Kubectl:
  """Runs the script; `applied` is the manifest that kubectl got."""

  def __init__(self, folder: pathlib.Path):
    """Writes the program."""
    self.folder = folder
    program = folder / 'kubectl'
    program.write_text(
      f'#!/bin/sh\necho "$*" >> {folder}/calls\ncat > {folder}/manifest\n'
      f'[ ! -e {folder}/refuse ] || {{ echo refused >&2; exit 1; }}\n'
    )
    program.chmod(0o755)

  def run(self, *arguments: str, status: int = 0) -> str:
    """Runs the script and checks how it ends."""
    path = f'{self.folder}:{os.environ["PATH"]}'
    result = subprocess.run(
      [ROOT / 'launch' / 'gke' / 'run.sh', *arguments],
      env=os.environ | {'PATH': path},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert result.returncode == status, result.stdout
    return result.stdout

  def applied(self) -> dict:
    """Returns the manifest that was applied."""
    assert (self.folder / 'calls').read_text() == 'apply -f -\n'
    return yaml.safe_load((self.folder / 'manifest').read_text())


@pytest.fixture
def kubectl(tmp_path) -> Kubectl:
  """A kubectl that was not called."""
  return Kubectl(tmp_path)


def pod_of(manifest: dict) -> tuple[dict, dict, dict]:
  """Returns the job, its pod and the one container."""
  [replicated] = manifest['spec']['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  [container] = pod['containers']
  return job, pod, container


@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize('slices', [1, 3])
def test_nodes_have_the_chips_of_the_topology(kubectl, chip, slices):
  label, topology = CHIPS[chip]
  kubectl.run(*NAMES, chip, topology, str(slices), '--', 'python')
  manifest = kubectl.applied()
  job, pod, container = pod_of(manifest)
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': label,
    'cloud.google.com/gke-tpu-topology': topology,
  }
  resources = container['resources']
  assert resources['requests'] == resources['limits'] == {'google.com/tpu': 4}
  chips = math.prod(int(side) for side in topology.split('x'))
  assert job['parallelism'] == job['completions'] == chips // 4
  assert manifest['spec']['replicatedJobs'][0]['replicas'] == slices


def test_a_failed_pod_restarts_the_whole_set(kubectl):
  kubectl.run(*NAMES, 'v5e', '8x8', '1', '--', 'python')
  manifest = kubectl.applied()
  job, pod, _ = pod_of(manifest)
  assert manifest['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert manifest['kind'] == 'JobSet'
  # No process may be replaced alone: the others wait for it in vain.
  assert job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  assert manifest['spec']['failurePolicy']['maxRestarts'] > 0
  assert pod['terminationGracePeriodSeconds'] >= 60


def expand(text: str) -> str:
  """What Kubernetes makes of a word of a command without variables: $$ to $."""
  out, position = '', 0
  while position < len(text):
    out += text[position]
    position += 2 if text[position : position + 2] == '$$' else 1
  return out


def test_command_reaches_the_container_as_it_is(kubectl):
  kubectl.run(*NAMES, 'v5e', '8x8', '1', '--', 'python', *ARGUMENTS)
  manifest = kubectl.applied()
  _, _, container = pod_of(manifest)
  assert [expand(word) for word in container['command']] == [
    'python', *ARGUMENTS,
  ]  # fmt: skip
  # A single `$` before a parenthesis would be a variable.
  assert '$(' not in container['command'][5].replace('$$', '')
  assert manifest['metadata']['name'] == NAMES[0]
  assert container['image'] == NAMES[1]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['v4', '2x2', '1'], 'CHIP v4'),
    (['v5e', '2x2x2', '1'], 'TOPOLOGY 2x2x2'),
    (['v5p', '4x4', '1'], 'TOPOLOGY 4x4'),
    (['v5e', '0x4', '1'], 'TOPOLOGY 0x4'),
    (['v5e', '3x3', '1'], 'TOPOLOGY 3x3 has 9 chips'),
    (['v5e', '8x8', 'two'], 'SLICES two'),
  ],
)
def test_wrong_argument_is_named_and_nothing_applied(
  kubectl, arguments, message
):
  output = kubectl.run(*NAMES, *arguments, '--', 'python', status=2)
  assert f'error: {message}' in output
  assert not (kubectl.folder / 'calls').exists()


def test_script_without_arguments_explains_itself(kubectl):
  assert 'launch/gke/run.sh NAME IMAGE' in kubectl.run(status=2)


def test_what_kubectl_refuses_is_an_error(kubectl):
  (kubectl.folder / 'refuse').touch()
  output = kubectl.run(*NAMES, 'v5e', '8x8', '1', '--', 'python', status=1)
  assert 'refused' in output


def test_image_installs_the_repository_where_the_command_runs():
  lines = (ROOT / 'launch' / 'gke' / 'Dockerfile').read_text().splitlines()
  words = [line.split()[0] for line in lines if not line.startswith('#')]
  assert words == ['FROM', 'WORKDIR', 'COPY', 'RUN']
  assert "-e '.[tpu]'" in lines[-1]
