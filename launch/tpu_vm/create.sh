#!/usr/bin/env bash
# Creates a pod, and waits until it is ready.
#
#   launch/tpu_vm/create.sh NAME ZONE TYPE HOW [SLICES]
#
# TYPE is the accelerator type of a slice, as v5litepod-64, v5p-64 or v6e-32.
# HOW is one of
#   on-demand, spot      now, or not at all if there is no room
#   queued, queued-spot  as soon as there is room
# SLICES (1, if left out) of TYPE, joined by the network; queued alone.
set -euo pipefail
source "$(dirname "$0")/pod.sh"

readonly PAUSE=30  # Seconds between looks at the queue.

(($# == 4 || $# == 5)) || usage
name=$1 zone=$2 type=$3 how=$4 slices=${5:-1}
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "NAME $name: small letters, digits and hyphens alone." 2
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "SLICES $slices is not a number." 2
case $type in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) fail "TYPE $type is none of v5litepod-N, v5p-N and v6e-N." 2 ;;
esac
spot=()
case $how in
  on-demand | queued) ;;
  spot | queued-spot) spot=(--spot) ;;
  *) fail "HOW $how is none of on-demand, spot, queued and queued-spot." 2 ;;
esac
[[ $slices == 1 || $how == queued* ]] ||
  fail "$slices slices need queued or queued-spot, not $how." 2

if [[ $how == queued* ]]; then
  nodes=(--node-id="$name")
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$name")
  gcloud compute tpus queued-resources create "$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$version" \
    "${nodes[@]}" "${spot[@]}" --quiet ||
    fail "cannot ask for $type as $name in $zone."
else
  gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
    --accelerator-type="$type" --version="$version" "${spot[@]}" --quiet ||
    fail "cannot create $type as $name in $zone."
fi

while true; do
  found=$(pod_state "$name" "$zone") ||
    fail "cannot see what became of $name in $zone."
  say "$name: $found"
  case $found in
    ready*) exit 0 ;;
    waiting*) sleep "$PAUSE" ;;
    *) fail "$name in $zone will not be ready: $found" ;;
  esac
done
