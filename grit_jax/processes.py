"""The processes of a run: how they start, agree, and end together.

On TPU VMs, on GKE and under Slurm a process finds the others by itself;
anywhere else the flags of `grit_jax.train` name them. A run of one process
needs nothing.
"""

import hashlib
import signal
import socket
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from grit_jax.errors import UserError

# A process that says nothing for so long is taken for dead, and the others
# end. A long garbage collection or a slow disk is shorter.
HEARTBEAT_SECONDS = 30
# At the end processes wait so long for each other.
SHUTDOWN_SECONDS = 60


def start_processes(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Joins the run's other processes; call it before anything of JAX.

  Args:
    coordinator_address: HOST:PORT, free on the host of process 0.
    num_processes: of the run.
    process_id: of this process, from 0.

  All None: they are found from the cluster that this is, or this process is
  the only one.

  Raises:
    UserError: some are given and some not, or they cannot be.
  """
  given = {
    '--coordinator_address': coordinator_address,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [flag for flag, value in given.items() if value is None]
  limits: dict[str, Any] = {
    'heartbeat_timeout_seconds': HEARTBEAT_SECONDS,
    'shutdown_timeout_seconds': SHUTDOWN_SECONDS,
  }
  if len(missing) == len(given):
    try:
      jax.distributed.initialize(**limits)
    except ValueError as error:
      # What JAX says where it finds no cluster.
      if 'coordinator_address should be defined' not in str(error):
        raise
    return
  if coordinator_address is None or num_processes is None or process_id is None:
    raise UserError(
      f'{", ".join(missing)} missing: give all of {", ".join(given)}, or none '
      'on a TPU VM, on GKE or under Slurm.'
    )
  if not 0 <= process_id < num_processes:
    raise UserError(
      f'--process_id={process_id} is not in 0 to {num_processes - 1}, with '
      f'--num_processes={num_processes}.'
    )
  _check_address(coordinator_address)
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      cluster_detection_method='deactivate',
      **limits,
    )
  except RuntimeError as error:
    raise UserError(
      f'--coordinator_address={coordinator_address}: process {process_id} '
      f'cannot join: {error}. It must be free on the host of process 0, and '
      'reached from the others.'
    ) from error


def _check_address(address: str) -> None:
  """Checks what JAX would wait minutes for."""
  flag = f'--coordinator_address={address}'
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError(f'{flag} is not HOST:PORT.')
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
  except (OSError, UnicodeError) as error:
    raise UserError(f'{flag}: {host} is not known: {error}.') from error


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def check_equal(what: str, value: str) -> None:
  """Checks that all processes have the same value; all must call it.

  Raises:
    UserError: they have not; the message names `what` and the processes.
  """
  digest = hashlib.sha256(value.encode()).digest()
  digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  digests = np.asarray(digests).reshape(jax.process_count(), -1)
  others = np.flatnonzero((digests != digests[0]).any(axis=1))
  if others.size:
    raise UserError(
      f'{what}: that of process {", ".join(map(str, others))} is not that of '
      'process 0.'
    )


class StopOnSignal:
  """Remembers a SIGTERM (or Ctrl-C), so that the loop can save and end.

  With several processes the signal may reach one alone; they then agree on the
  step to stop at.
  """

  def __init__(self) -> None:
    """Takes over both signals; with several processes JAX has SIGTERM."""
    self._requested = False
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, self._request)

  def _request(self, number: int, frame: Any) -> None:
    del frame
    self._requested = True
    # A second one ends the process at once.
    signal.signal(number, signal.SIG_DFL)

  def reached(self, step: int) -> bool:
    """Whether to stop before this step; every process asks at every step."""
    if jax.process_count() == 1:
      return self._requested
    return multihost_utils.reached_preemption_sync_point(step)
