#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster through XPK (github.com/AI-Hypercomputer/xpk); see docs/launch.md.
#
#   launch/xpk.sh [--dry-run] ACTION [-- TRAIN OPTIONS]
#
# Actions: image (build and push), run, list, delete. Settings, from the environment:
#   CLUSTER, ZONE, PROJECT   of the GKE cluster (required)
#   IMAGE     to build, push and run, such as us-docker.pkg.dev/PROJECT/images/efficient-vlm
#             (required)
#   NAME      of the workload (efficient-vlm)
#   TYPE      tpu type (v5litepod-16)
#   RETRIES   restarts after a failure or preemption (20); each resumes from the newest checkpoint
# The workdir must be on a volume that all pods of the workload mount (Filestore).
set -euo pipefail

NAME=${NAME:-efficient-vlm} TYPE=${TYPE:-v5litepod-16} RETRIES=${RETRIES:-20}
ACTIONS="image run list delete"
here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/launch/launch.sh"
read_arguments "$@"
need CLUSTER ZONE PROJECT IMAGE

where=(--cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT")

image() {
  do_it docker build -t "$IMAGE" -f "$here/launch/Dockerfile" "$here"
  do_it docker push "$IMAGE"
}
run() {
  do_it xpk workload create --workload="$NAME" "${where[@]}" --tpu-type="$TYPE" --num-slices=1 \
    --docker-image="$IMAGE" --max-restarts="$RETRIES" \
    --command="efficient-vlm train --distributed$(printf ' %q' "${train[@]}")"
}
list() { do_it xpk workload list "${where[@]}"; }
delete() { do_it xpk workload delete --workload="$NAME" "${where[@]}"; }

"$action"
