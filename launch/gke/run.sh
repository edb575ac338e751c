#!/usr/bin/env bash
# Starts a command on slices of TPUs in GKE, as a JobSet.
#
#   launch/gke/run.sh NAME IMAGE CHIP TOPOLOGY SLICES -- COMMAND...
#
# CHIP is v5e, v5p or v6e, and TOPOLOGY that of the cluster's node pools, as
# 8x8, of machines with 4 chips. IMAGE is built as README.md says.
set -euo pipefail

readonly CHIPS_A_NODE=4

fail() {  # message
  echo "error: $1" >&2
  exit 2
}

# Prints a text as JSON has it; Kubernetes gets a `$$` for each `$`, which it
# would expand otherwise.
quote() {  # text
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "${text//\$/\$\$}"
}

(($# >= 7)) && [[ $6 == -- ]] || {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
name=$1 image=$2 chip=$3 topology=$4 slices=$5
shift 6

case $chip in
  v5e) accelerator=tpu-v5-lite-podslice sides=2 ;;
  v5p) accelerator=tpu-v5p-slice sides=3 ;;
  v6e) accelerator=tpu-v6e-slice sides=2 ;;
  *) fail "CHIP $chip is none of v5e, v5p and v6e." ;;
esac
[[ x$topology =~ ^(x[1-9][0-9]*){$sides}$ ]] || fail "TOPOLOGY $topology is none of $chip."
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "SLICES $slices is not a number."
chips=$((${topology//x/*}))
((chips && chips % CHIPS_A_NODE == 0)) ||
  fail "TOPOLOGY $topology has $chips chips: no multiple of $CHIPS_A_NODE."

command=''
for word in "$@"; do
  command+=${command:+, }$(quote "$word")
done
manifest=$(<"$(dirname "$0")/jobset.yaml")
manifest=${manifest//\$NAME/"$name"}
manifest=${manifest//\$IMAGE/"$image"}
manifest=${manifest//\$ACCELERATOR/"$accelerator"}
manifest=${manifest//\$TOPOLOGY/"$topology"}
manifest=${manifest//\$SLICES/"$slices"}
manifest=${manifest//\$NODES/"$((chips / CHIPS_A_NODE))"}
# The last: it may have any text.
manifest=${manifest//\$COMMAND/"[$command]"}
kubectl apply -f - <<<"$manifest"
