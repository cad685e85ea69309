#!/usr/bin/env bash
# Trains on a Cloud TPU, one host or a pod: create, copy this checkout, install, run on every
# worker, and start again after a preemption. See docs/launch.md.
#
#   experiments/tpu_vm.sh [--dry-run] ACTION [-- TRAIN OPTIONS]
#
# Actions: create, sync, install, run, status, logs, stop, delete; all (create to run);
# watch (all, and again whenever the TPU is preempted, until the run has ended).
# Settings, from the environment:
#   NAME      of the TPU (efficient-vlm)
#   ZONE      such as us-central2-b (required)
#   TYPE      accelerator type (v5litepod-16)
#   RUNTIME   software version (v2-alpha-tpuv5-lite)
#   SPOT      1 for one that may be preempted (1)
#   NFS       ADDRESS:/PATH of a file share that all workers mount at /mnt/runs; needed for a pod,
#             whose workers write one checkpoint together
#   POLL      seconds between looks of `watch` (60)
# --dry-run prints every command and runs none.
set -euo pipefail

NAME=${NAME:-efficient-vlm} TYPE=${TYPE:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
ZONE=${ZONE:-} SPOT=${SPOT:-1} NFS=${NFS:-} POLL=${POLL:-60}
ACTIONS="create sync install run status logs stop delete all watch"
here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/experiments/launch.sh"
read_arguments "$@"
need ZONE

tpu() { local verb=$1; shift; do_it gcloud compute tpus tpu-vm "$verb" "$NAME" --zone="$ZONE" "$@"; }
everywhere() { tpu ssh --worker=all --command="$1"; }

create() {
  local more=()
  [ "$SPOT" != 1 ] || more=(--spot)
  tpu create --accelerator-type="$TYPE" --version="$RUNTIME" "${more[@]}"
}
sync() {
  # What git knows, and nothing else: no data, no runs.
  do_it git -C "$here" archive --format=tar.gz --output=/tmp/efficient_vlm.tar.gz HEAD
  do_it gcloud compute tpus tpu-vm scp /tmp/efficient_vlm.tar.gz "$NAME:" --zone="$ZONE" --worker=all
  everywhere 'mkdir -p efficient_vlm && tar -xzf efficient_vlm.tar.gz -C efficient_vlm'
}
install() {
  everywhere 'python3 -m venv .venv && .venv/bin/pip install -q -e efficient_vlm "jax[tpu]"'
  if [ -n "$NFS" ]; then
    everywhere "sudo apt-get install -yq nfs-common && sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || sudo mount -t nfs $(printf %q "$NFS") /mnt/runs)"
  else
    everywhere 'sudo mkdir -p /mnt/runs && sudo chown "$USER" /mnt/runs'
  fi
}
run() {
  local words
  words=$(printf ' %q' "${train[@]}")
  # The same command starts a run and goes on with it.
  everywhere "cd efficient_vlm && rm -f ../train.code && (setsid nohup ../.venv/bin/efficient-vlm train --distributed$words >../train.log 2>&1; echo \$? >../train.code) </dev/null >/dev/null 2>&1 &"
}
status() { tpu describe --format='value(state)'; }
logs() { tpu ssh --worker=0 --command='tail -n 50 train.log; cat train.code 2>/dev/null'; }
stop() { everywhere 'pkill -TERM -f "efficient-vlm train" || true'; }
delete() { tpu delete --quiet; }
all() { create; sync; install; run; }
# READY, PREEMPTED, ...; NONE if there is no such TPU.
state() { gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || echo NONE; }
ended() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 --command='cat train.code' 2>/dev/null || true; }
watch() {
  if [ "$dry" = 1 ]; then
    all; status
    printf '# state PREEMPTED, TERMINATED or NONE: again, from the newest checkpoint\n'
    delete; all
    return
  fi
  all
  while sleep "$POLL"; do
    case $(state) in
      READY)
        code=$(ended)
        [ -z "$code" ] || { printf 'The run has ended with %s.\n' "$code"; return "$code"; } ;;
      PREEMPTED | TERMINATED) delete; all ;;
      NONE) all ;;
    esac
  done
}

"$action"
