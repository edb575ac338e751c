#!/usr/bin/env bash
# Sends the run a SIGTERM, and waits until it has ended; on a worker.
set -euo pipefail

readonly PATIENCE=600  # Seconds that it may take to save.

state=$HOME/grit_jax_run
[[ -e $state/lock ]] || exit 0
if ! flock --nonblock "$state/lock" true; then
  # The command is the one child of the shell that start.sh has left.
  pkill -TERM --parent "$(<"$state/pid")" || true
  flock --wait "$PATIENCE" "$state/lock" true || {
    echo "error: the run on $(hostname) has not ended in $PATIENCE s." >&2
    exit 1
  }
fi
