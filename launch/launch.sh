# Shared by the launch scripts, which set ACTIONS and source this file.

fail() { printf 'error: %s\n' "$1" >&2; [ $# -lt 2 ] || printf '  fix: %s\n' "$2" >&2; exit 2; }

# [--dry-run] ACTION [-- TRAIN OPTIONS] into dry, action and train.
read_arguments() {
  dry=0
  [ "${1:-}" != --dry-run ] || { dry=1; shift; }
  action=${1:-}
  [ -n "$action" ] || fail "no action" "one of: $ACTIONS"
  [[ " $ACTIONS " == *" $action "* ]] || fail "unknown action '$action'" "one of: $ACTIONS"
  shift
  if [ $# -gt 0 ]; then
    [ "$1" = -- ] || fail "unknown option '$1'" "options of train stand behind --"
    shift
  fi
  train=("$@")
  [ ${#train[@]} -gt 0 ] || train=(--config=configs/quickstart.py --workdir=/mnt/runs/quickstart)
}

# NAME...: settings that must not be empty.
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || fail "$name is not set" "$name=... $0 $action"
  done
}

# Prints a command, ready to be pasted, and runs it unless this is a dry run.
do_it() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [ "$dry" = 1 ] || "$@"
}
