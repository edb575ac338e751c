"""Stands in for `gcloud`: what it knows of a cloud lies in a folder.

The folder, CLOUD in the environment, has `calls.jsonl`, a line a call, and

- `queued/NAME`: states of a queued resource;
- `nodes/NAME/states`: states of a node. Of several lines the first is the
  present one, and goes when it has been listed;
- `nodes/NAME/queued`: the queued resource that the node is of;
- `nodes/NAME/workers/I`: the home of a worker. A command goes to a shell there,
  as over ssh.
- `answers/COMMAND`: lines of an exit status and a message, to fail with, each
  once; and `answers/states`: the states that what is created goes through.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

CLOUD = pathlib.Path(os.environ['CLOUD'])
WORKERS = 2


def main() -> None:
  """Does what the command line says."""
  with open(CLOUD / 'calls.jsonl', 'a') as file:
    file.write(json.dumps(sys.argv[1:]) + '\n')
  words = [word for word in sys.argv[1:] if not word.startswith('-')]
  flags = dict(
    word.removeprefix('--').partition('=')[::2]
    for word in sys.argv[1:]
    if word.startswith('--')
  )
  group, command, names = words[2], words[3], words[4:]
  assert words[:2] == ['compute', 'tpus'] and 'zone' in flags
  fail_if_told(f'{group}-{command}')
  actions = {
    ('tpu-vm', 'create'): lambda: create_node(names[0]),
    ('tpu-vm', 'delete'): lambda: shutil.rmtree(CLOUD / 'nodes' / names[0]),
    ('tpu-vm', 'list'): lambda: list_nodes(flags),
    ('tpu-vm', 'ssh'): lambda: run(names[0], flags),
    ('tpu-vm', 'scp'): lambda: copy(*names, flags),
    ('queued-resources', 'create'): lambda: create_queued(names[0], flags),
    ('queued-resources', 'delete'): lambda: delete_queued(names[0], flags),
    ('queued-resources', 'list'): lambda: list_queued(flags),
  }
  actions[group, command]()


def fail_if_told(command: str) -> None:
  """Fails with the next answer for this command, if there is one."""
  path = CLOUD / 'answers' / command
  lines = path.read_text().splitlines() if path.exists() else []
  if lines:
    path.write_text('\n'.join(lines[1:]))
    status, _, message = lines[0].partition(' ')
    print(message, file=sys.stderr)
    sys.exit(int(status))


def next_state(path: pathlib.Path) -> str:
  """Returns the present state, and goes on to the next."""
  first, *others = path.read_text().splitlines()
  path.write_text('\n'.join(others or [first]))
  return first


def matches(filter: str, key: str, value: str) -> bool:
  """Whether a term of a filter, `KEY~REGEX` with OR between, holds."""
  terms = [term.split('~') for term in filter.split(' OR ')]
  return any(
    bool(re.search(regex, value)) for name, regex in terms if name == key
  )


def create_node(name: str, queued: str = '') -> None:
  """Makes a node and its workers' homes."""
  node = CLOUD / 'nodes' / name
  for worker in range(WORKERS):
    (node / 'workers' / str(worker)).mkdir(parents=True)
  (node / 'states').write_text('READY')
  (node / 'queued').write_text(queued)


def create_queued(name: str, flags: dict[str, str]) -> None:
  """Makes a queued resource and its nodes."""
  states = CLOUD / 'answers' / 'states'
  text = states.read_text() if states.exists() else 'ACTIVE'
  (CLOUD / 'queued' / name).write_text(text)
  nodes = [flags['node-id']] if 'node-id' in flags else []
  for number in range(int(flags.get('node-count', 0))):
    nodes.append(f'{flags["node-prefix"]}-{number}')
  for node in nodes:
    create_node(node, queued=f'projects/p/locations/z/queuedResources/{name}')


def delete_queued(name: str, flags: dict[str, str]) -> None:
  """Removes a queued resource and, as with --force, its nodes."""
  assert 'force' in flags
  (CLOUD / 'queued' / name).unlink()
  for node in (CLOUD / 'nodes').iterdir():
    if (node / 'queued').read_text().endswith(f'/{name}'):
      shutil.rmtree(node)


def list_nodes(flags: dict[str, str]) -> None:
  """Prints name and state of the nodes that the filter is for."""
  assert flags['format'] == 'value[separator=" "](name.basename(),state)'
  for node in sorted((CLOUD / 'nodes').iterdir()):
    full = f'projects/p/locations/z/nodes/{node.name}'
    queued = (node / 'queued').read_text()
    if matches(flags['filter'], 'name', full) or matches(
      flags['filter'], 'queuedResource', queued
    ):
      print(node.name, next_state(node / 'states'))


def list_queued(flags: dict[str, str]) -> None:
  """Prints the state of the queued resource that the filter is for."""
  assert flags['format'] == 'value(state.state)'
  for path in (CLOUD / 'queued').iterdir():
    full = f'projects/p/locations/z/queuedResources/{path.name}'
    if matches(flags['filter'], 'name', full):
      print(next_state(path))


def homes(node: str, worker: str) -> list[pathlib.Path]:
  """Returns the homes of a worker, or of all."""
  folder = CLOUD / 'nodes' / node / 'workers'
  return sorted(folder.iterdir()) if worker == 'all' else [folder / worker]


def run(node: str, flags: dict[str, str]) -> None:
  """Runs a command in a shell on each worker; the last failure counts."""
  processes = [
    subprocess.Popen(
      ['bash', '-c', flags['command']],
      cwd=home,
      env=os.environ | {'HOME': str(home)},
      stdin=subprocess.DEVNULL,
    )
    for home in homes(node, flags['worker'])
  ]
  sys.exit(max(process.wait() for process in processes))


def copy(source: str, target: str, flags: dict[str, str]) -> None:
  """Copies a file into each worker's home."""
  node, _, path = target.partition(':')
  for home in homes(node, flags['worker']):
    shutil.copy(source, home / path)


if __name__ == '__main__':
  main()
