#!/usr/bin/env bash
# Stops a pod's run: it saves a checkpoint and ends. The pod stays.
#
#   launch/tpu_vm/stop.sh NAME ZONE
set -euo pipefail
source "$(dirname "$0")/pod.sh"

(($# == 2)) || usage
on_all_workers "$1" "$2" 'bash grit_jax/launch/tpu_vm/worker/stop.sh' ||
  fail "the run did not stop on all workers of $1: see above."
