# Functions that the scripts beside it source: what a pod is, and its workers.
#
# A pod is a TPU VM node of this name, or a queued resource of this name with
# its nodes, one a slice.
# shellcheck shell=bash

say() {  # message
  echo "$(date '+%F %T') $*" >&2
}

fail() {  # message [exit status]
  echo "error: $1" >&2
  exit "${2:-1}"
}

# Prints the comment at the top of the script, and ends it.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# Prints the queued resource's state; nothing if there is none.
queued_state() {  # name zone
  gcloud compute tpus queued-resources list --zone="$2" \
    --filter="name~/$1\$" --format='value(state.state)'
}

# Prints a line a node: name and state.
list_nodes() {  # name zone
  gcloud compute tpus tpu-vm list --zone="$2" \
    --filter="name~/$1\$ OR queuedResource~/$1\$" \
    --format='value[separator=" "](name.basename(),state)'
}

# Prints one word, and the states that it comes from:
#   ready    all nodes are up
#   waiting  wait, and it will be another
#   lost     it will not come back by itself: delete it
#   absent   there is nothing of this name
pod_state() {  # name zone
  local queued nodes states
  queued=$(queued_state "$1" "$2") || return
  nodes=$(list_nodes "$1" "$2") || return
  states=${queued:+$queued, }${nodes//$'\n'/, }
  if [[ -z $queued$nodes ]]; then
    echo absent
  elif [[ $states =~ PREEMPTED|TERMINATED|STOPPED|HIDDEN|FAILED|SUSPENDED ]]; then
    echo "lost $states"
  elif [[ -z $nodes || ${queued:-ACTIVE} != ACTIVE ]] ||
    grep -qv ' READY$' <<<"$nodes"; then
    echo "waiting $states"
  else
    echo "ready $states"
  fi
}

# Runs a command on all workers of all nodes at once.
on_all_workers() {  # name zone command
  local nodes node pid pids=() status=0
  nodes=$(list_nodes "$1" "$2") || return
  [[ -n $nodes ]] || fail "there is no pod $1 in $2."
  while read -r node _; do
    gcloud compute tpus tpu-vm ssh "$node" --zone="$2" --worker=all \
      --command="$3" --quiet </dev/null &
    pids+=("$!")
  done <<<"$nodes"
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return "$status"
}

# Prints the states of the run on the workers (worker/status.sh), each once.
run_states() {  # name zone
  on_all_workers "$1" "$2" \
    'bash grit_jax/launch/tpu_vm/worker/status.sh 2>/dev/null || echo none' |
    sort -u
}
