#!/usr/bin/env bash
# Installs this repository, as committed, on all workers of a pod.
#
#   launch/tpu_vm/setup.sh NAME ZONE
#
# It goes to ~/grit_jax of every worker, and its packages to ~/grit_jax_env.
set -euo pipefail
source "$(dirname "$0")/pod.sh"

(($# == 2)) || usage
name=$1 zone=$2
root=$(cd "$(dirname "$0")/../.." && pwd)

states=$(run_states "$name" "$zone") || fail "cannot reach the workers of $name."
[[ $states != *running* ]] ||
  fail "a run is going on; launch/tpu_vm/stop.sh $name $zone stops it."
if [[ -n $(git -C "$root" status --porcelain) ]]; then
  say 'There are changes that are not committed: they stay here.'
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git -C "$root" archive --format=tar.gz --output="$folder/grit_jax.tar.gz" HEAD
while read -r node _; do
  gcloud compute tpus tpu-vm scp "$folder/grit_jax.tar.gz" \
    "$node:grit_jax.tar.gz" --zone="$zone" --worker=all --quiet </dev/null ||
    fail "cannot copy to the workers of $node."
done < <(list_nodes "$name" "$zone")
on_all_workers "$name" "$zone" 'rm -rf grit_jax && mkdir grit_jax &&
  tar -xzf grit_jax.tar.gz -C grit_jax &&
  bash grit_jax/launch/tpu_vm/worker/setup.sh' ||
  fail "the set-up failed on a worker of $name: see above."
say "$name: $(git -C "$root" describe --always) is installed."
