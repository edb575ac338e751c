"""Stands in for `gcloud`: what it knows of a cloud lies in a folder.

The scripts start it hundreds of times: importing more than `os` and `sys` would
take most of the time of their tests.

The folder, CLOUD in the environment, has `calls`, a line a call, and

- `queued/NAME`: states of a queued resource;
- `nodes/NAME/states`: states of a node. Of several lines the first is the
  present one, and goes when it has been listed;
- `nodes/NAME/queued`: the queued resource that the node is of;
- `nodes/NAME/workers/I`: the home of a worker. A command goes to a shell there,
  as over ssh.
- `answers/COMMAND`: lines of an exit status and a message, to fail with, each
  once; and `answers/states`: the states that what is created goes through.
"""

import os
import sys

CLOUD = os.environ['CLOUD']
WORKERS = 2


def main() -> None:
  """Does what the command line says."""
  with open(f'{CLOUD}/calls', 'a') as file:
    file.write(f'{sys.argv[1:]!r}\n')
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
    ('tpu-vm', 'delete'): lambda: remove_node(names[0]),
    ('tpu-vm', 'list'): lambda: list_nodes(flags),
    ('tpu-vm', 'ssh'): lambda: run(names[0], flags),
    ('tpu-vm', 'scp'): lambda: copy(*names, flags),
    ('queued-resources', 'create'): lambda: create_queued(names[0], flags),
    ('queued-resources', 'delete'): lambda: delete_queued(names[0], flags),
    ('queued-resources', 'list'): lambda: list_queued(flags),
  }
  actions[group, command]()


def read(path: str) -> str:
  """Returns a file's text; nothing if there is no file."""
  if not os.path.exists(path):
    return ''
  with open(path) as file:
    return file.read()


def write(path: str, text: str) -> None:
  """Writes a file's text."""
  with open(path, 'w') as file:
    file.write(text)


def fail_if_told(command: str) -> None:
  """Fails with the next answer for this command, if there is one."""
  path = f'{CLOUD}/answers/{command}'
  lines = read(path).splitlines()
  if lines:
    write(path, '\n'.join(lines[1:]))
    status, _, message = lines[0].partition(' ')
    print(message, file=sys.stderr)
    sys.exit(int(status))


def next_state(path: str) -> str:
  """Returns the present state, and goes on to the next."""
  first, *others = read(path).splitlines()
  write(path, '\n'.join(others or [first]))
  return first


def matches(filter: str, key: str, value: str) -> bool:
  """Whether a term of a filter, `KEY~END$` with OR between, holds."""
  assert filter.endswith('$')
  terms = [term.split('~') for term in filter[:-1].split('$ OR ')]
  return any(name == key and value.endswith(end) for name, end in terms)


def create_node(name: str, queued: str = '') -> None:
  """Makes a node and its workers' homes."""
  node = f'{CLOUD}/nodes/{name}'
  for worker in range(WORKERS):
    os.makedirs(f'{node}/workers/{worker}')
  write(f'{node}/states', 'READY')
  write(f'{node}/queued', queued)


def remove_node(name: str) -> None:
  """Removes a node and its workers' homes."""
  import shutil

  shutil.rmtree(f'{CLOUD}/nodes/{name}')


def create_queued(name: str, flags: dict[str, str]) -> None:
  """Makes a queued resource and its nodes."""
  states = read(f'{CLOUD}/answers/states') or 'ACTIVE'
  write(f'{CLOUD}/queued/{name}', states)
  nodes = [flags['node-id']] if 'node-id' in flags else []
  for number in range(int(flags.get('node-count', 0))):
    nodes.append(f'{flags["node-prefix"]}-{number}')
  for node in nodes:
    create_node(node, queued=f'projects/p/locations/z/queuedResources/{name}')


def delete_queued(name: str, flags: dict[str, str]) -> None:
  """Removes a queued resource and, as with --force, its nodes."""
  assert 'force' in flags
  os.unlink(f'{CLOUD}/queued/{name}')
  for node in os.listdir(f'{CLOUD}/nodes'):
    if read(f'{CLOUD}/nodes/{node}/queued').endswith(f'/{name}'):
      remove_node(node)


def list_nodes(flags: dict[str, str]) -> None:
  """Prints name and state of the nodes that the filter is for."""
  assert flags['format'] == 'value[separator=" "](name.basename(),state)'
  for node in sorted(os.listdir(f'{CLOUD}/nodes')):
    folder = f'{CLOUD}/nodes/{node}'
    full = f'projects/p/locations/z/nodes/{node}'
    if matches(flags['filter'], 'name', full) or matches(
      flags['filter'], 'queuedResource', read(f'{folder}/queued')
    ):
      print(node, next_state(f'{folder}/states'))


def list_queued(flags: dict[str, str]) -> None:
  """Prints the state of the queued resource that the filter is for."""
  assert flags['format'] == 'value(state.state)'
  for name in os.listdir(f'{CLOUD}/queued'):
    full = f'projects/p/locations/z/queuedResources/{name}'
    if matches(flags['filter'], 'name', full):
      print(next_state(f'{CLOUD}/queued/{name}'))


def homes(node: str, worker: str) -> list[str]:
  """Returns the homes of a worker, or of all."""
  folder = f'{CLOUD}/nodes/{node}/workers'
  workers = sorted(os.listdir(folder)) if worker == 'all' else [worker]
  return [f'{folder}/{worker}' for worker in workers]


def run(node: str, flags: dict[str, str]) -> None:
  """Runs a command in a shell on each worker; the last failure counts."""
  processes = []
  for home in homes(node, flags['worker']):
    process = os.fork()
    if not process:
      os.chdir(home)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      environment = os.environ | {'HOME': home}
      os.execvpe('bash', ['bash', '-c', flags['command']], environment)
    processes.append(process)
  sys.exit(
    max(
      os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
      for process in processes
    )
  )


def copy(source: str, target: str, flags: dict[str, str]) -> None:
  """Copies a file into each worker's home."""
  import shutil

  node, _, path = target.partition(':')
  for home in homes(node, flags['worker']):
    shutil.copy(source, f'{home}/{path}')


if __name__ == '__main__':
  main()
