#!/bin/sh
# Run train.py, evaluate.py or torchrun by name, and any other word as a sub-command of `medsam2`. `exec` replaces this
# shell, so that the signal of `docker stop` reaches the program, and a run saves and ends.
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
