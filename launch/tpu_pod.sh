#!/usr/bin/env bash
# Training on a Cloud TPU pod slice: the same command on all of its machines. Or another that they can run together.
#
#   bash launch/tpu_pod.sh NAME ZONE ARGUMENTS
#
# such as
#
#   COMMAND=prepare bash launch/tpu_pod.sh my-v5e-256 us-west4-a --images=/mnt/shared/imagenet/train \
#     --vae=/mnt/shared/sd-vae-ft-ema --image_size=256 --flip=both --out=/mnt/shared/latents/imagenet256
#   bash launch/tpu_pod.sh my-v5e-256 us-west4-a --config=mpdit_b_256 --workdir=/mnt/shared/runs/mpdit_b_256 \
#     --config.data.path=/mnt/shared/latents/imagenet256
#
# The batch (config.batch_size, 1,024 in that config) has to be a multiple of the number of chips, 256 here.
# COMMAND=train (the default), prepare, sample or evaluate starts `python -m mpdit_jax.COMMAND`. --workdir and --out must
# be on a file system that every machine mounts, such as Filestore; a bucket's gs:// name is none.
# Expects on every machine a clone of the repository in ~/mpdit_jax, installed into ~/mpdit_jax/.venv. Once, after the
# slice is made, with Python 3.11 or newer:
#
#   gcloud compute tpus tpu-vm ssh my-v5e-256 --zone=us-west4-a --worker=all --command="git clone URL ~/mpdit_jax && \
#     cd ~/mpdit_jax && python3 -m venv .venv && .venv/bin/pip install -r requirements.txt -e '.[tpu]'"
#
# JAX finds the machines through the TPU's metadata server. Ctrl-C here, or a lost connection, stops a training on all
# of them at its next line of output, saved; a preempted slice is continued by the same command. DRY_RUN=1 prints what would
# be run.
#
# No flags are set: libtpu hides the latency of collectives by default. LIBTPU_INIT_ARGS, where set here, is passed on.
set -euo pipefail

case ${1:-} in
  '' | -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}" && exit ;;
esac
[ $# -ge 3 ] || { echo "Error: expected NAME ZONE ARGUMENTS; see $0 --help." >&2 && exit 2; }
name=$1 zone=$2
shift 2

# Quoted once for this shell and once more for the one on the machines.
printf -v arguments '%q ' "mpdit_jax.${COMMAND:-train}" "$@"
command="cd ~/mpdit_jax && "
if [ -n "${LIBTPU_INIT_ARGS:-}" ]; then
  printf -v command '%sLIBTPU_INIT_ARGS=%q ' "$command" "$LIBTPU_INIT_ARGS"
fi
command="$command.venv/bin/python -u -m $arguments"

ssh=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$command")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${ssh[@]}"
  echo
  exit
fi
command -v gcloud >/dev/null || { echo "Error: gcloud is not installed; see cloud.google.com/sdk." >&2 && exit 1; }
exec "${ssh[@]}"
