#!/bin/sh
# train.py, evaluate.py and torchrun by their names; anything else is a command of `medsam2`. Each takes the place of
# this shell, so that the signal of `docker stop` reaches it: a run saves and ends.
set -eu

code=/opt/medsam2
case "${1:-}" in
train.py | evaluate.py)
    script=$1
    shift
    exec python "$code/$script" "$@"
    ;;
torchrun)
    exec "$@"
    ;;
*)
    exec medsam2 "$@"
    ;;
esac
