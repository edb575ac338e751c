#!/usr/bin/env bash
# Starts a command on all workers of a pod, and leaves it running.
#
#   launch/tpu_vm/run.sh NAME ZONE -- COMMAND...
#
# It runs in ~/grit_jax, where `python` is that of the set-up; its output goes
# to ~/grit_jax_run/log (logs.sh). It ends by itself, or by stop.sh.
set -euo pipefail
source "$(dirname "$0")/pod.sh"

(($# >= 4)) && [[ $3 == -- ]] || usage
name=$1 zone=$2
shift 3
on_all_workers "$name" "$zone" \
  "bash grit_jax/launch/tpu_vm/worker/start.sh $(printf '%q ' "$@")" ||
  fail "the command did not start on all workers of $name: see above."
say "$name: started on all workers."
