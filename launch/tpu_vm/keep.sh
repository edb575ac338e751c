#!/usr/bin/env bash
# Keeps a run going until it has ended: creates its pod, sets it up, starts the
# command, and does so again whenever the pod is preempted.
#
#   launch/tpu_vm/keep.sh NAME ZONE TYPE HOW [SLICES] -- COMMAND...
#
# The first arguments are those of create.sh. COMMAND must go on from where it
# was when it is started again, as `python -m grit_jax.train` does with its
# workdir on gs://. Leave it running, as in tmux; started again it goes on by
# what it finds. It ends with 0 when the command has, and with 1 when the
# command fails on a pod that is well. The pod stays.
set -euo pipefail
source "$(dirname "$0")/pod.sh"

readonly PAUSE=60  # Seconds between looks at the pod.

here=$(dirname "$0")
pod=()
while (($#)) && [[ $1 != -- ]]; do
  pod+=("$1")
  shift
done
(((${#pod[@]} == 4 || ${#pod[@]} == 5) && $# >= 2)) || usage
command=("$@")
name=${pod[0]} zone=${pod[1]}
failed=''  # What the run failed with at the last look.

start() {
  "$here/run.sh" "$name" "$zone" "${command[@]}" || true  # It says why.
}

# Looks at the run of a pod that is ready, and starts it where it must be.
look_at_run() {
  local states
  states=$(run_states "$name" "$zone") || {
    say "$name: a worker does not answer."
    return
  }
  states=${states//$'\n'/, }
  case $states in
    *running*) ;;
    *none*)
      if "$here/setup.sh" "$name" "$zone"; then
        start
      fi ;;
    *lost* | *'exited 143'*)  # Its machine went down, or it got a SIGTERM.
      say "$name: the run is $states; starting it again."
      start ;;
    'exited 0')
      say "$name: the run has ended. The pod costs until you delete it:" \
        "launch/tpu_vm/delete.sh $name $zone"
      exit 0 ;;
    "$failed")  # A worker that was lost would have shown by now.
      fail "the run $states on a pod that is ready; logs.sh says why." ;;
    *)
      failed=$states
      return ;;
  esac
  failed=''
}

while true; do
  found=$(pod_state "$name" "$zone") || found='waiting for an answer'
  case $found in
    absent)
      status=0
      "$here/create.sh" "${pod[@]}" || status=$?
      ((status != 2)) || exit 2  # Its arguments are wrong.
      ((status == 0)) && continue ;;
    lost*)
      say "$name: $found; creating it anew."
      "$here/delete.sh" "$name" "$zone" && continue ;;
    ready*)
      look_at_run ;;
    *)
      say "$name: $found" ;;
  esac
  sleep "$PAUSE"
done
