#!/usr/bin/env bash
#SBATCH --job-name=efficient-vlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# One process per node, with all GPUs of the node; see docs/launch.md.
#
#   sbatch launch/slurm.sh --config=configs/quickstart.py --workdir=/shared/runs/quickstart
#
# Two minutes before the time limit Slurm sends SIGTERM: the run saves, exits with 143, and is
# requeued. DRY_RUN=1, or --dry-run as the first argument, prints the commands and runs none.
set -uo pipefail

if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
if [ $# -eq 0 ]; then
  printf 'error: no options of train\n  fix: sbatch launch/slurm.sh --config=FILE --workdir=DIR\n' >&2
  exit 2
fi
do_it() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [ "${DRY_RUN:-0}" = 1 ] || "$@"
}

# JAX uses one GPU per Slurm task. With one task per node it must be told to use all GPUs.
if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ]; then
  export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))}
fi
do_it srun --kill-on-bad-exit=1 efficient-vlm train --distributed "$@"
code=$?
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '# after exit code 143 (stopped, saved):\n'
  do_it scontrol requeue "${SLURM_JOB_ID:-JOB}"
elif [ "$code" = 143 ]; then
  do_it scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
