#!/usr/bin/env bash
# Follows the output of a pod's run, until it ends or Ctrl-C.
#
#   launch/tpu_vm/logs.sh NAME ZONE [WORKER]
#
# WORKER of the first slice: 0, if left out, reports for all.
set -euo pipefail
source "$(dirname "$0")/pod.sh"

(($# == 2 || $# == 3)) || usage
name=$1 zone=$2 worker=${3:-0}
nodes=$(list_nodes "$name" "$zone")
[[ -n $nodes ]] || fail "there is no pod $name in $zone."
node=$(sort <<<"$nodes" | head -n 1)
# shellcheck disable=SC2016 # It is for the worker to expand.
gcloud compute tpus tpu-vm ssh "${node%% *}" --zone="$zone" \
  --worker="$worker" --quiet --command='cd grit_jax_run &&
    tail -n 200 --pid="$(cat pid)" -F log'
