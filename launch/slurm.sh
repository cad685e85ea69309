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
# One process a node, all of its GPUs each; see docs/launch.md.
#
#   sbatch launch/slurm.sh --config=configs/quickstart.py --workdir=/shared/runs/quickstart
#
# Two minutes before the time is over Slurm sends SIGTERM: the run saves and ends with 143, and is
# put into the queue again. DRY_RUN=1, or --dry-run in front, prints the commands and runs none.
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

# JAX takes one GPU for a task of Slurm: right for a task a GPU, else it is told of the node's.
if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ]; then
  export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))}
fi
do_it srun --kill-on-bad-exit=1 efficient-vlm train --distributed "$@"
code=$?
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '# behind exit code 143 (stopped, saved):\n'
  do_it scontrol requeue "${SLURM_JOB_ID:-JOB}"
elif [ "$code" = 143 ]; then
  do_it scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
