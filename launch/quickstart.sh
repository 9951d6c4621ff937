#!/usr/bin/env bash
# From a fresh clone to a trained model that draws digits, on a plain CPU:
#
#   bash launch/quickstart.sh
#
# Makes .venv, installs, trains configs/digits.py in runs/digits and draws a guided grid from it. Run it again to
# continue a training that was stopped, or to draw again from one that is done. PYTHON=... picks the Python (>= 3.11).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

if [ $# -gt 0 ]; then
  case $1 in -h | --help) print_header launch/quickstart.sh && exit ;; esac
  fail "quickstart.sh takes no arguments, got '$*'; to train with other settings use python -m mpdit_jax.train --help."
fi

workdir=runs/digits
again="bash '$PWD/launch/quickstart.sh'"
prepare_environment ''

# The training runs beside this script, which can so pass SIGTERM on to it; both get a terminal's Ctrl-C. The training
# then saves and exits with success, so whether to go on to sampling is decided by the signal and not by its exit code.
stopped=0
training=''
trap 'stopped=130' INT
trap 'stopped=143; [ -z "$training" ] || kill -TERM "$training" 2>/dev/null || true' TERM
# The subshell takes back what bash does to a background command: it would be deaf to Ctrl-C.
(
  trap - INT TERM
  exec "$VENV_PYTHON" -m mpdit_jax.train --config=digits --workdir="$workdir"
) &
training=$!
status=0
while kill -0 "$training" 2>/dev/null; do
  status=0
  wait "$training" || status=$? # a signal ends this wait before the training has saved
done
trap - INT TERM
if [ "$stopped" -ne 0 ]; then
  printf '\nStopped before the training was done. To go on: %s\n' "$again" >&2
  exit "$stopped"
fi
[ "$status" -eq 0 ] || exit "$status"

"$VENV_PYTHON" -m mpdit_jax.sample --workdir="$workdir" --num_samples=80 --steps=50 --guidance_scale=2.0 --seed=0 \
  --out="$workdir/samples.png"

cat <<EOF

Done. In $PWD:
  picture      $workdir/samples.png   (one row a class)
  checkpoints  $workdir/checkpoints
  TensorBoard  $workdir/tensorboard   ($VENV/bin/tensorboard --logdir=$workdir/tensorboard)

Next, from that folder:
  draw threes and fives:
    $VENV_PYTHON -m mpdit_jax.sample --workdir=$workdir --labels=3,5 --num_samples=16 --out=$workdir/3_and_5.png
  train with another learning rate:
    $VENV_PYTHON -m mpdit_jax.train --config=digits --workdir=runs/mine --config.optimizer.learning_rate=3e-4
  train on 60,000 pictures of clothes:
    $VENV_PYTHON -m mpdit_jax.train --config=fashion_mnist --workdir=runs/fashion_mnist
EOF
