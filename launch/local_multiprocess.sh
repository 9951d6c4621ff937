#!/usr/bin/env bash
# Runs one command as several processes on this machine, as a cluster would.
#
#   bash launch/local_multiprocess.sh N COMMAND [ARGUMENTS]
#
# starts `python -m mpdit_jax.COMMAND ARGUMENTS` N times, such as
#
#   bash launch/local_multiprocess.sh 2 train --config=digits --workdir=runs/two
#
# Process 0 prints progress; the others print only errors. Ctrl-C and SIGTERM reach all of them; when one fails the others are
# ended. On CPU every process has one device, or as many as DEVICES=... says; on a machine with accelerators give each
# its own, by CUDA_VISIBLE_DEVICES or TPU_VISIBLE_DEVICES in a wrapper. PYTHON=... picks the Python, PORT=... the first
# of the two ports that are used (12355); a second run needs others.
set -euo pipefail

case ${1:-} in
  '' | -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}" && exit ;;
  *[!0-9]* | 0*) echo "Error: N=$1: expected a number of processes, 1 or more." >&2 && exit 2 ;;
esac
[ $# -ge 2 ] || { echo "Error: no command was given. For example: $0 $1 train --config=... --workdir=..." >&2 && exit 2; }
count=$1 command=$2
shift 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "Error: $python does not run; bash launch/quickstart.sh makes .venv." >&2 && exit 1; }
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355} JAX_NUM_PROCESSES=$count
if [ -n "${DEVICES:-}" ]; then
  XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
fi
# On CPUs, processes exchange data through gloo, which mixes up collectives that they begin in different orders.
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_cpu_enable_concurrency_optimized_scheduler=false"

logs=$(mktemp -d)
processes=()
forward() { kill "-$1" "${processes[@]}" 2>/dev/null || true; }
# Not SIGINT for SIGINT: bash has what it starts in the background ignore that, and the processes respect it.
trap 'forward TERM' TERM INT
trap 'rm -rf "$logs"' EXIT

for ((index = 0; index < count; index++)); do
  if [ "$index" -eq 0 ]; then
    JAX_PROCESS_ID=0 "$python" -m "mpdit_jax.$command" "$@" &
  else
    JAX_PROCESS_ID=$index "$python" -m "mpdit_jax.$command" "$@" >"$logs/$index" 2>&1 &
  fi
  processes+=($!)
done

# Waits for each in turn, over and over, so that a failure of any is seen within a second.
status=0
running=("${processes[@]}")
while [ ${#running[@]} -gt 0 ] && [ "$status" -eq 0 ]; do
  left=()
  for process in "${running[@]}"; do
    if kill -0 "$process" 2>/dev/null; then
      left+=("$process")
    else
      wait "$process" || status=$?
    fi
  done
  running=(${left[@]+"${left[@]}"})
  [ ${#running[@]} -eq 0 ] || sleep 0.2 || true # which Ctrl-C ends as well
done
if [ "$status" -ne 0 ]; then
  sleep 2 # the others may be about to say the same
  forward KILL
  for ((index = 1; index < count; index++)); do
    printf -- '--- process %d:\n' "$index" >&2
    tail -n 5 "$logs/$index" >&2
  done
fi
exit "$status"
