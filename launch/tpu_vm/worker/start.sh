#!/usr/bin/env bash
# Starts a command and leaves it running; on a worker.
#
#   start.sh COMMAND...
#
# ~/grit_jax_run then has its output in `log`, a lock that is held while it
# runs, and, once it has ended, its exit status in `status`.
set -euo pipefail

state=$HOME/grit_jax_run
mkdir -p "$state"
exec 9>"$state/lock"
flock --nonblock 9 || {
  echo "error: a run is going on on $(hostname)." >&2
  exit 1
}
rm -f "$state/status"
cd "$HOME/grit_jax"
export PATH=$HOME/grit_jax_env/bin:$PATH
echo "$(date '+%F %T') $(printf '%q ' "$@")" >>"$state/log"
# A shell outlives the command, to tell how it ended: also one that is told to
# stop with it, as by a machine that is shut down.
# shellcheck disable=SC2016 # It is for that shell to expand.
setsid bash -c 'trap : TERM
  state=$1
  shift
  status=0
  "$@" || status=$?
  echo "$status" >"$state/status"' start.sh "$state" "$@" \
  </dev/null >>"$state/log" 2>&1 &
echo "$!" >"$state/pid"
