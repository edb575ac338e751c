#!/usr/bin/env bash
# Deletes a pod, at once and without asking; nothing to delete is no error.
#
#   launch/tpu_vm/delete.sh NAME ZONE
set -euo pipefail
source "$(dirname "$0")/pod.sh"

(($# == 2)) || usage
name=$1 zone=$2
queued=$(queued_state "$name" "$zone")
nodes=$(list_nodes "$name" "$zone")
if [[ -n $queued ]]; then
  # With its nodes.
  gcloud compute tpus queued-resources delete "$name" --zone="$zone" \
    --force --quiet || fail "cannot delete $name in $zone."
elif [[ -n $nodes ]]; then
  gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet ||
    fail "cannot delete $name in $zone."
else
  say "$name: there is no such pod in $zone."
fi
