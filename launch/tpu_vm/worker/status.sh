#!/usr/bin/env bash
# Prints what became of the run: none, running, lost (its machine went down),
# or `exited` and its status; on a worker.
set -euo pipefail

state=$HOME/grit_jax_run
if [[ ! -e $state/lock ]]; then
  echo none
elif ! flock --nonblock "$state/lock" true; then
  echo running
elif [[ -s $state/status ]]; then
  echo "exited $(<"$state/status")"
else
  echo lost
fi
