#!/usr/bin/env bash
# Trains on a Cloud TPU, one host or a pod: create, copy this checkout, install, run on every
# worker, and start again after a preemption. See docs/launch.md.
#
#   launch/tpu_vm.sh [--dry-run] ACTION [-- TRAIN OPTIONS]
#
# Actions: create, sync, install, run, status, logs, stop, delete; all (create to run);
# watch (all, and again whenever the TPU is preempted, until the run has ended).
# Settings, from the environment:
#   NAME      of the TPU (efficient-vlm)
#   ZONE      such as us-west4-a, one that has TYPE (required)
#   TYPE      accelerator type (v5litepod-16)
#   RUNTIME   software version (v2-alpha-tpuv5-lite)
#   SPOT      1 for one that may be preempted (1)
#   NFS       ADDRESS:/PATH of a file share that all workers mount at /mnt/runs; needed for a pod,
#             whose workers write one checkpoint together
#   POLL      seconds between checks of `watch` (60)
# --dry-run prints every command and runs none.
set -euo pipefail

NAME=${NAME:-efficient-vlm} TYPE=${TYPE:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
ZONE=${ZONE:-} SPOT=${SPOT:-1} NFS=${NFS:-} POLL=${POLL:-60}
ACTIONS="create sync install run status logs stop delete all watch"
here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/launch/launch.sh"
read_arguments "$@"
need ZONE

tpu() { local verb=$1; shift; do_it gcloud compute tpus tpu-vm "$verb" "$NAME" --zone="$ZONE" "$@"; }
everywhere() { tpu ssh --worker=all --command="$1"; }
# Queries of `watch`: not printed, their warnings and errors go to a file.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
ask() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}" 2>"$said"; }

create() {
  local more=()
  [ "$SPOT" != 1 ] || more=(--spot)
  tpu create --accelerator-type="$TYPE" --version="$RUNTIME" "${more[@]}"
}
sync() {
  # Only files that git tracks: no data, no runs.
  do_it git -C "$here" archive --format=tar.gz --output=/tmp/efficient_vlm.tar.gz HEAD &&
    do_it gcloud compute tpus tpu-vm scp /tmp/efficient_vlm.tar.gz "$NAME:" --zone="$ZONE" --worker=all &&
    everywhere 'mkdir -p efficient_vlm && tar -xzf efficient_vlm.tar.gz -C efficient_vlm'
}
install() {
  local folder='sudo mkdir -p /mnt/runs'
  [ -z "$NFS" ] || folder="sudo apt-get install -yq nfs-common && $folder && (mountpoint -q /mnt/runs || sudo mount -t nfs $(printf %q "$NFS") /mnt/runs)"
  # Images have an older Python; uv installs its own.
  everywhere 'python3 -m pip install -q --user uv && ([ -x .venv/bin/python ] || .local/bin/uv venv -q --python=3.11 .venv) && .local/bin/uv pip install -q --python=.venv/bin/python -e efficient_vlm "jax[tpu]"' &&
    everywhere "$folder && { [ -w /mnt/runs ] || sudo chmod 1777 /mnt/runs; }"
}
# A reboot keeps the files but invalidates the process numbers in them.
BOOT=/proc/sys/kernel/random/boot_id
ALIVE='alive() { { [ "$(cat train.boot)" = "$(cat '$BOOT')" ] && kill -0 "$(cat train.shell)"; } 2>/dev/null; }'
# A worker may still have the previous run, which holds its chips; checkpoints survive a kill.
END='while alive; do kill -KILL "$(cat train.pid)"; sleep 0.1; done 2>/dev/null; rm -f train.{code,pid,shell,stopped}; cat '$BOOT' >train.boot'
# Detached, so that ssh returns at once: no remaining process holds its output.
RUN='"$@" >../train.log 2>&1 & echo $! >../train.pid; wait $!; echo $? >../train.code'
run() {
  local words
  words=$(printf ' %q' ../.venv/bin/efficient-vlm train --distributed "${train[@]}")
  # The same command starts and resumes a run.
  everywhere "$ALIVE; $END; cd efficient_vlm && { setsid nohup bash -c $(printf %q "$RUN") run$words </dev/null >/dev/null 2>&1 & echo \$! >../train.shell; }"
}
status() { tpu describe --format='value(state)'; }
logs() { tpu ssh --worker=0 --command='tail -n 50 train.log; cat train.code 2>/dev/null'; }
# A run that has just been started has no process number yet.
STOP='if alive && [ ! -f train.code ]; then [ -f train.stopped ] || { touch train.stopped; until [ -s train.pid ] || ! alive; do sleep 0.1; done; kill -TERM "$(cat train.pid)" || rm train.stopped; }; else echo "no run to stop on $(hostname)"; fi'
stop() { everywhere "$ALIVE; $STOP"; }
delete() { tpu delete --quiet; }
all() { create && sync && install && run; }

# READY, PREEMPTED, ...; NONE if there is no such TPU; empty if it is unknown for now.
state() {
  if ! ask describe --format='value(state)'; then
    if grep -qi 'not.found' "$said"; then echo NONE; fi
  fi
}
# running, none, stopped, or the exit code of the run; empty if it is unknown for now. The shell of
# a run ends after its code.
PROGRESS="$ALIVE; "'if alive; then echo running; elif [ ! -f train.code ]; then echo none; elif [ -f train.stopped ]; then echo stopped; else cat train.code; fi'
progress() { ask ssh --worker=0 --command="$PROGRESS" | grep -xE 'running|none|stopped|[0-9]+' || true; }
again() { printf 'That failed; again in %s s.\n' "$POLL"; }
start() { sync && install && run; }
watch() {
  if [ "$dry" = 1 ]; then
    all; status
    printf '# state PREEMPTED, TERMINATED or NONE: again, from the newest checkpoint\n'
    delete; all
    return
  fi
  # due: start it in any case, because it never ran, or not on all workers.
  local first=1 due=0 code
  while :; do
    case $(state) in
      NONE) create || again ;;
      PREEMPTED | TERMINATED) delete || again ;;
      READY)
        code=$(progress)
        # A run that ended before this watch does not belong to it.
        [[ $first = 0 || -z $code || $code = running ]] || code=none
        [[ $due = 0 || -z $code ]] || code=none
        case $code in
          '') ;;
          running) first=0 ;;
          # 143 without `stop` is a preemption that has begun.
          none | 143) if start; then first=0 due=0; else due=1; again; fi ;;
          *)
            printf 'The run has ended with %s.\n' "$code"
            [ "$code" != stopped ] || code=143
            return "$code" ;;
        esac ;;
    esac
    sleep "$POLL"
  done
}

"$action"
