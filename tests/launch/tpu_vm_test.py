"""Runs the scripts for TPU VMs against a cloud in a folder."""

import json
import os
import signal
import sys

import object_store
import pytest
from small_run import ROOT

pytestmark = pytest.mark.e2e

POD = ('pod', 'us-west4-a')
ZONE = '--zone=us-west4-a'
# Spaces, quotes, and what a shell would expand or end a command at.
ARGUMENTS = [
  '--config=configs/a b.py', "it's", '"two"', '$HOME', '`date`', '*', 'a;b',
  '', '\\n', 'line\nline', '--config.data.paths=gs://b/a,gs://b/c',
]  # fmt: skip
# A run that writes its arguments, and goes on until it is told to end with a
# status, in a file of that name, or by a SIGTERM, which it takes a while for.
RUN = """
import json, os, pathlib, signal, sys, time
home = pathlib.Path.home()
with open(home / 'starts', 'a') as file:
  file.write(json.dumps([sys.executable, os.getcwd(), *sys.argv[1:]]) + '\\n')
print('step 1', flush=True)
def stop(*_):
  time.sleep(0.3)
  (home / 'saved').touch()
  sys.exit(143)
signal.signal(signal.SIGTERM, stop)
# A test that leaves a run behind does not leave it for ever.
latest = time.monotonic() + 120
while not (home / 'end').exists():
  if time.monotonic() > latest:
    sys.exit('nobody has ended this run')
  time.sleep(0.01)
print('step 2', flush=True)
sys.exit(int((home / 'end').read_text()))
"""


# A run that holds its workdir on an object store, by its first process.
HOLD = """
import json, os, pathlib, time
from etils import epath
from grit_jax import lease
lease.RENEW_SECONDS, lease.STALE_SECONDS = 0.3, 1.2
home = pathlib.Path.home()
def run():
  with open(home / 'starts', 'a') as file:
    file.write(json.dumps([os.getpid()]) + '\\n')
  while not (home / 'end').exists():
    time.sleep(0.01)
if home.name == min(path.name for path in home.parent.iterdir()):
  with lease.hold(epath.Path('gs://bucket/run')):
    run()
else:
  run()
"""


def command(*arguments: str) -> list[str]:
  return ['--', 'python', '-S', '-c', RUN, *arguments]


def starts(home) -> list[list[str]]:
  """Returns the arguments of the runs that a worker has started."""
  path = home / 'starts'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def set_up(tmp_path_factory, empty):
  """A pod of one slice with two workers, set up, to be copied."""
  cloud = empty.copy(tmp_path_factory.mktemp('pod'))
  cloud.run('create.sh', *POD, 'v5litepod-8', 'on-demand')
  cloud.run('setup.sh', *POD)
  return cloud


@pytest.fixture
def pod(tmp_path, set_up):
  """A pod of one slice with two workers, set up."""
  pod = set_up.copy(tmp_path)
  yield pod
  pod.stop_machines()


# Creation.


@pytest.mark.parametrize(
  ('type', 'version'),
  [
    ('v5litepod-64', 'v2-alpha-tpuv5-lite'),
    ('v5p-64', 'v2-alpha-tpuv5'),
    ('v6e-32', 'v2-alpha-tpuv6e'),
  ],
)
def test_create_takes_the_runtime_of_the_type(cloud, type, version):
  cloud.run('create.sh', *POD, type, 'on-demand')
  assert cloud.calls('tpu-vm', 'create') == [
    ['pod', ZONE, f'--accelerator-type={type}', f'--version={version}',
     '--quiet'],
  ]  # fmt: skip
  assert not cloud.calls('queued-resources', 'create')


def test_create_asks_for_spot_when_told(cloud):
  cloud.run('create.sh', *POD, 'v6e-8', 'spot')
  [call] = cloud.calls('tpu-vm', 'create')
  assert '--spot' in call


@pytest.mark.parametrize(
  ('how', 'slices', 'nodes'),
  [
    ('queued', [], ['--node-id=pod']),
    ('queued-spot', ['1'], ['--node-id=pod', '--spot']),
    ('queued', ['2'], ['--node-count=2', '--node-prefix=pod']),
    ('queued-spot', ['3'], ['--node-count=3', '--node-prefix=pod', '--spot']),
  ],
)
def test_create_queues_slices_and_waits_for_them(cloud, how, slices, nodes):
  cloud.answer('states', 'WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE')
  output = cloud.run('create.sh', *POD, 'v5litepod-64', how, *slices)
  assert cloud.calls('queued-resources', 'create') == [
    ['pod', ZONE, '--accelerator-type=v5litepod-64',
     '--runtime-version=v2-alpha-tpuv5-lite', *nodes, '--quiet'],
  ]  # fmt: skip
  assert not cloud.calls('tpu-vm', 'create')
  order = [
    output.index(word)
    for word in ('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ready ACTIVE')
  ]
  assert order == sorted(order)


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED'])
def test_create_ends_with_an_error_when_the_queue_does(cloud, state):
  cloud.answer('states', f'PROVISIONING\n{state}')
  output = cloud.run('create.sh', *POD, 'v6e-8', 'queued', status=1)
  assert 'pod in us-west4-a will not be ready' in output and state in output


@pytest.mark.parametrize(
  ('how', 'group'),
  [('on-demand', 'tpu-vm'), ('queued-spot', 'queued-resources')],
)
def test_create_that_fails_says_so(cloud, how, group):
  cloud.answer(f'{group}-create', '1 There is no more capacity in the zone')
  output = cloud.run('create.sh', *POD, 'v6e-8', how, status=1)
  assert 'no more capacity' in output
  assert 'error: cannot' in output and 'v6e-8 as pod in us-west4-a' in output


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([*POD, 'v4-8', 'spot'], 'TYPE v4-8'),
    ([*POD, 'v6e-8', 'cheap'], 'HOW cheap'),
    ([*POD, 'v6e-8', 'spot', '2'], '2 slices need queued'),
    ([*POD, 'v6e-8', 'queued', '0'], 'SLICES 0'),
    (['My_pod', 'us-west4-a', 'v6e-8', 'spot'], 'NAME My_pod'),
  ],
)
def test_create_names_a_wrong_argument(cloud, arguments, message):
  output = cloud.run('create.sh', *arguments, status=2)
  assert f'error: {message}' in output
  assert not cloud.calls()


@pytest.mark.parametrize(
  'script',
  [
    'create.sh', 'setup.sh', 'run.sh', 'logs.sh', 'stop.sh', 'delete.sh',
    'keep.sh',
  ],
)  # fmt: skip
def test_script_without_arguments_explains_itself(cloud, script):
  output = cloud.run(script, status=2)
  assert f'launch/tpu_vm/{script} NAME ZONE' in output
  assert 'set -euo' not in output and not cloud.calls()


# Set-up.


def test_setup_installs_the_commit_on_all_workers(cloud):
  cloud.run('create.sh', *POD, 'v6e-8', 'queued', '2')
  (cloud.clone / 'new.py').write_text('new = True')
  cloud.commit()
  cloud.run('setup.sh', *POD)
  assert len(cloud.homes()) == 4
  for home in cloud.homes():
    assert (home / 'grit_jax' / 'new.py').read_text() == 'new = True'
    python = home / 'grit_jax_env'
    assert (
      f'pip install --quiet --python {python} -e .[tpu]'
      in (home / 'installed').read_text()
    )


def test_setup_replaces_what_an_earlier_one_left(pod):
  (pod.homes()[0] / 'grit_jax' / 'old.py').touch()
  pod.run('setup.sh', *POD)
  assert not (pod.homes()[0] / 'grit_jax' / 'old.py').exists()


def test_setup_says_that_changes_stay_here(pod):
  assert 'not committed' not in pod.run('setup.sh', *POD)
  (pod.clone / 'new.py').touch()
  assert 'not committed' in pod.run('setup.sh', *POD)
  assert not (pod.homes()[0] / 'grit_jax' / 'new.py').exists()


def test_setup_that_fails_on_one_worker_fails(pod):
  (pod.homes()[1] / 'no_network').touch()
  output = pod.run('setup.sh', *POD, status=1)
  assert 'no network' in output
  assert 'error: the set-up failed on a worker of pod' in output


def test_setup_leaves_a_run_alone(pod):
  pod.run('run.sh', *POD, *command())
  output = pod.run('setup.sh', *POD, status=1)
  assert 'error: a run is going on' in output


# Runs.


def test_command_reaches_all_workers_as_it_is(cloud, wait_until):
  cloud.run('create.sh', *POD, 'v6e-8', 'queued', '2')
  cloud.run('setup.sh', *POD)
  cloud.run('run.sh', *POD, *command(*ARGUMENTS))
  homes = cloud.homes()
  assert len(homes) == 4
  for home in homes:
    wait_until(lambda home=home: starts(home), f'a start in {home}')
    [[_, folder, *arguments]] = starts(home)
    assert arguments == ARGUMENTS
    assert folder == str(home / 'grit_jax')


def test_python_is_that_of_the_setup(pod, wait_until):
  home = pod.homes()[0]
  link = home / 'grit_jax_env' / 'bin' / 'python'
  link.unlink()
  link.write_text(f'#!/bin/sh\ntouch "$HOME/ours"\nexec {sys.executable} "$@"')
  link.chmod(0o755)
  pod.run('run.sh', *POD, *command())
  wait_until((home / 'ours').exists, 'its python')


def test_second_run_beside_the_first_is_refused(pod, wait_until):
  pod.run('run.sh', *POD, *command('1'))
  output = pod.run('run.sh', *POD, *command('2'), status=1)
  assert 'error: a run is going on' in output
  assert 'did not start on all workers of pod' in output
  for home in pod.homes():
    wait_until(lambda home=home: starts(home), f'a start in {home}')
    assert [arguments[2:] for arguments in starts(home)] == [['1']]


def test_run_without_a_pod_is_an_error(cloud):
  output = cloud.run('run.sh', *POD, *command(), status=1)
  assert 'error: there is no pod pod in us-west4-a' in output


def test_another_pod_with_this_name_in_its_name_is_left_alone(pod, wait_until):
  pod.run('create.sh', 'pod-2', 'us-west4-a', 'v6e-8', 'spot')
  pod.run('create.sh', 'my-pod', 'us-west4-a', 'v6e-8', 'queued')
  pod.run('run.sh', *POD, *command())
  others = [h for h in pod.homes() if h.parents[1].name != 'pod']
  ours = [h for h in pod.homes() if h.parents[1].name == 'pod']
  assert len(others) == 4 and len(ours) == 2
  for home in ours:
    wait_until(lambda home=home: starts(home), f'a start in {home}')
  assert not any(starts(home) for home in others)
  pod.run('delete.sh', *POD)
  assert {h.parents[1].name for h in pod.homes()} == {'pod-2', 'my-pod'}


def test_logs_follow_the_run_to_its_end(pod, wait_until):
  pod.run('run.sh', *POD, *command())
  process = pod.start('logs.sh', *POD)
  assert any('step 1' in line for line in iter(process.stdout.readline, ''))
  assert process.poll() is None
  (pod.homes()[0] / 'end').write_text('0')
  output, _ = process.communicate(timeout=120)
  assert 'step 2' in output and process.returncode == 0


def test_logs_of_another_worker(pod, wait_until):
  pod.run('run.sh', *POD, *command())
  log = pod.homes()[1] / 'grit_jax_run' / 'log'
  (pod.homes()[1] / 'end').write_text('0')
  wait_until(lambda: 'step 2' in log.read_text(), 'step 2')
  assert 'step 2' in pod.run('logs.sh', *POD, '1')


def test_stop_lets_the_run_save_and_waits_for_it(pod, wait_until):
  pod.run('run.sh', *POD, *command())
  for home in pod.homes():
    wait_until(lambda home=home: starts(home), f'a start in {home}')
  pod.run('stop.sh', *POD)
  for home in pod.homes():
    assert (home / 'saved').exists()
    assert (home / 'grit_jax_run' / 'status').read_text() == '143\n'
  pod.run('stop.sh', *POD)  # Nothing to stop is no error.
  pod.run('run.sh', *POD, *command())


def test_machine_that_is_shut_down_lets_the_run_save(pod, wait_until):
  pod.run('run.sh', *POD, *command())
  home = pod.homes()[0]
  wait_until(lambda: starts(home), 'a start')
  # Then every process gets the signal, the one that watches the run too.
  os.killpg(int((home / 'grit_jax_run' / 'pid').read_text()), signal.SIGTERM)
  status = home / 'grit_jax_run' / 'status'
  wait_until(lambda: status.exists() and status.read_text(), 'its end')
  assert status.read_text() == '143\n' and (home / 'saved').exists()


# Deletion.


def test_delete_asks_nothing_and_may_be_repeated(pod):
  pod.run('delete.sh', *POD)
  assert pod.calls('tpu-vm', 'delete') == [['pod', ZONE, '--quiet']]
  assert not pod.homes()
  assert 'no such pod' in pod.run('delete.sh', *POD)
  assert len(pod.calls('tpu-vm', 'delete')) == 1


def test_delete_takes_the_nodes_of_a_queued_resource_along(cloud):
  cloud.run('create.sh', *POD, 'v6e-8', 'queued', '2')
  cloud.run('delete.sh', *POD)
  assert cloud.calls('queued-resources', 'delete') == [
    ['pod', ZONE, '--force', '--quiet']
  ]
  assert not cloud.homes()
  cloud.run('delete.sh', *POD)


@pytest.mark.parametrize('command', ['tpu-vm-delete', 'tpu-vm-list'])
def test_delete_that_fails_is_an_error(pod, command):
  pod.answer(command, '1 permission denied')
  assert 'permission denied' in pod.run('delete.sh', *POD, status=1)
  assert pod.homes()


# The keeper.


def end(cloud, status: int) -> None:
  for home in cloud.homes():
    # Whole at once: the program looks for it all the time.
    (home / 'end.partial').write_text(str(status))
    (home / 'end.partial').rename(home / 'end')


def wait_for_starts(cloud, wait_until, workers: int, number: int) -> None:
  """Waits until all workers have started a number of runs."""
  wait_until(
    lambda: (
      len(cloud.homes()) == workers
      and all(len(starts(home)) == number for home in cloud.homes())
    ),
    f'start {number} on {workers} workers',
  )


def finish(process, status: int) -> str:
  output, _ = process.communicate(timeout=120)
  assert process.returncode == status, output
  return output


def test_keeper_takes_a_run_from_nothing_to_its_end(cloud, wait_until):
  process = cloud.start('keep.sh', *POD, 'v6e-8', 'spot', *command(*ARGUMENTS))
  wait_for_starts(cloud, wait_until, 2, 1)
  assert [starts(home)[0][2:] for home in cloud.homes()] == [ARGUMENTS] * 2
  end(cloud, 0)
  output = finish(process, 0)
  assert 'the run has ended' in output
  assert 'launch/tpu_vm/delete.sh pod us-west4-a' in output
  assert cloud.homes()


@pytest.mark.parametrize(
  ('how', 'workers'), [(['spot'], 2), (['queued-spot', '2'], 4)]
)
def test_keeper_recreates_a_preempted_pod_and_starts_the_same_command(
  cloud, wait_until, how, workers
):
  process = cloud.start('keep.sh', *POD, 'v6e-8', *how, *command(*ARGUMENTS))
  for number in (1, 2):
    wait_for_starts(cloud, wait_until, workers, 1)
    for home in cloud.homes():
      [[_, _, *arguments]] = starts(home)
      assert arguments == ARGUMENTS
    if number == 1:
      cloud.preempt('pod')
  end(cloud, 0)
  output = finish(process, 0)
  assert 'creating it anew' in output
  group = 'queued-resources' if how[0].startswith('queued') else 'tpu-vm'
  created = cloud.calls(group, 'create')
  assert len(created) == 2 and created[0] == created[1]
  assert len(cloud.calls(group, 'delete')) == 1


def test_keeper_asks_again_when_there_is_no_room(cloud, wait_until):
  cloud.answer('tpu-vm-create', '1 no more capacity\n' * 3)
  process = cloud.start('keep.sh', *POD, 'v6e-8', 'spot', *command())
  wait_for_starts(cloud, wait_until, 2, 1)
  end(cloud, 0)
  assert finish(process, 0).count('no more capacity') == 3
  assert len(cloud.calls('tpu-vm', 'create')) == 4


def test_keeper_waits_for_a_pod_that_is_on_its_way(pod, wait_until):
  states = pod.folder / 'nodes' / 'pod' / 'states'
  states.write_text('REPAIRING\nREPAIRING\nREADY')
  process = pod.start('keep.sh', *POD, 'v6e-8', 'spot', *command())
  wait_for_starts(pod, wait_until, 2, 1)
  end(pod, 0)
  assert finish(process, 0).count('waiting pod REPAIRING') == 2
  assert not pod.calls('tpu-vm', 'delete')


def test_keeper_takes_up_a_run_that_goes_on(pod, wait_until):
  pod.run('run.sh', *POD, *command())
  wait_for_starts(pod, wait_until, 2, 1)
  process = pod.start('keep.sh', *POD, 'v6e-8', 'spot', *command())
  wait_until(
    lambda: pod.naps.exists() and len(pod.naps.read_text()) > 2, 'a third look'
  )
  end(pod, 0)
  finish(process, 0)
  assert [len(starts(home)) for home in pod.homes()] == [1, 1]


def test_keeper_starts_again_what_a_reboot_has_ended(pod, wait_until):
  process = pod.start('keep.sh', *POD, 'v6e-8', 'spot', *command())
  wait_for_starts(pod, wait_until, 2, 1)
  pod.stop_machines()
  wait_for_starts(pod, wait_until, 2, 2)
  end(pod, 0)
  finish(process, 0)
  assert len(pod.calls('tpu-vm', 'create')) == 1


def test_keeper_starts_again_what_a_sigterm_has_stopped(pod, wait_until):
  process = pod.start('keep.sh', *POD, 'v6e-8', 'spot', *command())
  wait_for_starts(pod, wait_until, 2, 1)
  pod.run('stop.sh', *POD)
  wait_for_starts(pod, wait_until, 2, 2)
  end(pod, 0)
  finish(process, 0)


def test_keeper_starts_again_what_was_killed_while_it_held_its_workdir(
  pod, wait_until
):
  with object_store.serve() as (store, address):
    pod.environment |= {
      'TENSORSTORE_GCS_HTTP_URL': address,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      'PYTHONPATH': str(ROOT),
    }
    hold = ('--', sys.executable, '-c', HOLD)
    process = pod.start('keep.sh', *POD, 'v6e-8', 'spot', *hold)
    for number in (1, 2):
      wait_for_starts(pod, wait_until, 2, number)
      [pid] = starts(pod.homes()[0])[-1]
      assert json.loads(store.objects['run/.lock'][1])['pid'] == pid
      if number == 1:
        pod.stop_machines()
    end(pod, 0)
    finish(process, 0)
    assert not store.objects


@pytest.mark.parametrize('failing', [1, 2])
def test_keeper_ends_when_the_command_fails_on_a_pod_that_is_well(
  pod, wait_until, failing
):
  process = pod.start('keep.sh', *POD, 'v6e-8', 'spot', *command())
  wait_for_starts(pod, wait_until, 2, 1)
  for home, status in zip(pod.homes(), ['1', '10'[failing - 1]], strict=True):
    (home / 'end').write_text(status)
  output = finish(process, 1)
  assert 'on a pod that is ready; logs.sh says why' in output
  assert 'exited 1' in output
  assert [len(starts(home)) for home in pod.homes()] == [1, 1]


def test_keeper_does_not_take_the_end_of_a_lost_pod_for_a_failure(
  pod, wait_until
):
  process = pod.start('keep.sh', *POD, 'v6e-8', 'spot', *command())
  wait_for_starts(pod, wait_until, 2, 1)
  # A worker's peers fail before the cloud says why.
  states = pod.folder / 'nodes' / 'pod' / 'states'
  states.write_text('READY\nPREEMPTED')
  end(pod, 1)
  wait_until(lambda: len(pod.calls('tpu-vm', 'create')) == 2, 'a new pod')
  wait_for_starts(pod, wait_until, 2, 1)
  end(pod, 0)
  finish(process, 0)


def test_keeper_goes_on_when_the_cloud_does_not_answer(pod, wait_until):
  pod.answer('tpu-vm-list', '1 service unavailable\n' * 2)
  process = pod.start('keep.sh', *POD, 'v6e-8', 'spot', *command())
  wait_for_starts(pod, wait_until, 2, 1)
  pod.answer('tpu-vm-ssh', '255 connection refused')
  end(pod, 0)
  finish(process, 0)


def test_keeper_ends_at_a_wrong_argument(cloud):
  output = cloud.run('keep.sh', *POD, 'v4-8', 'spot', *command(), status=2)
  assert 'TYPE v4-8' in output
