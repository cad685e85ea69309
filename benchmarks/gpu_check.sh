#!/usr/bin/env bash
# What tests can only compile, on one Hopper GPU (H100, H200), in at most eight minutes:
#
#   bash benchmarks/gpu_check.sh             writes benchmarks/results/gpu_check.json
#   bash benchmarks/gpu_check.sh --dry-run   every step in its smallest form on a CPU
#
# Installs the extra `cuda` where JAX has no GPU. Each step has a time limit; one that fails is
# recorded, and the next one runs. --out=FILE writes elsewhere. Ends with 0 if every step passed, 1
# if one did not, 2 if there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

DEADLINE=480 DRY="" OUT=""
for word in "$@"; do
  case $word in
    --dry-run) DRY=1 ;;
    --out=*) OUT=${word#--out=} ;;
    *)
      echo "error: $word; allowed: --dry-run, --out=FILE" >&2
      exit 2
      ;;
  esac
done
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
# A test of this script must not pass for a measurement.
OUT=${OUT:-$([ "$DRY" ] && echo "${TMPDIR:-/tmp}/gpu_check_dry_run.json" || echo benchmarks/results/gpu_check.json)}
PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, and writes down how that ended. The
# command may leave numbers in $SCRATCH/NAME.json.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  ((limit > DEADLINE - SECONDS)) && limit=$((DEADLINE - SECONDS))
  if ((limit < 5)); then
    status=skipped
  else
    echo "--- $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" > "$SCRATCH/$name.log" 2>&1
    case $? in
      0) status=passed ;;
      124 | 137) status=timeout ;;
      *) status=failed ;;
    esac
    tail -n 5 "$SCRATCH/$name.log"
  fi
  echo "$name $status $((SECONDS - start))" | tee -a "$SCRATCH/steps"
}

sees_gpu() { "$PYTHON" -c "import jax, sys; sys.exit(jax.default_backend() != 'gpu')" 2> /dev/null; }

if [ "$DRY" ]; then
  export JAX_PLATFORMS=cpu
  SMALL=--dry-run
else
  if ! nvidia-smi -L 2> /dev/null | grep -q GPU; then
    echo "error: no GPU is visible (nvidia-smi lists none); --dry-run needs none" >&2
    exit 2
  fi
  unset JAX_PLATFORMS
  sees_gpu || step install 200 "$PYTHON" -m pip install -q -e '.[cuda]'
  if ! sees_gpu; then
    echo "error: nvidia-smi lists a GPU, but JAX does not see it: $(tail -n 1 "$SCRATCH"/install.log)" >&2
    exit 2
  fi
  export JAX_PLATFORMS=cuda,cpu  # Else tests ask for the CPU.
  SMALL=""
fi

tests=tests/kernels/attention/test_attention_gpu
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider)
numbers() { echo "--out=$SCRATCH/$1.json"; }

if [ "$DRY" ]; then
  step dispatch 120 "${pytest[@]}" "$tests.py" -k "default and out and False"
  step attention 60 "$PYTHON" benchmarks/gpu_check_parts.py attention $SMALL "$(numbers attention)"
else
  step dispatch 60 "${pytest[@]}" "$tests.py" -k "default or cudnn"
  step attention 120 "$PYTHON" benchmarks/attention_gpu.py --quick --repeats=3 "$(numbers attention)"
fi
step experts 60 "$PYTHON" benchmarks/grouped_matmul.py --repeats=5 ${DRY:+--quick} "$(numbers experts)"
step decoding 70 "$PYTHON" benchmarks/gpu_check_parts.py decoding $SMALL "$(numbers decoding)"
step cuts 70 "$PYTHON" benchmarks/gpu_check_parts.py cuts $SMALL "$(numbers cuts)"
# Last: its many programs take what time is left.
if [ "$DRY" ]; then
  # JAX has a GPU interpreter from 0.11 on; before that lowering is all that a CPU can do.
  step contract 180 "${pytest[@]}" -m "slow or not slow" -k "test_forward_backward and plain or \
    test_lowers and plain and 64" "$tests.py" "${tests}_interpreted.py"
else
  step contract 200 "${pytest[@]}" "$tests.py" -k TestGpu
fi

"$PYTHON" benchmarks/gpu_check_parts.py gather --scratch="$SCRATCH" $SMALL "--out=$OUT"
