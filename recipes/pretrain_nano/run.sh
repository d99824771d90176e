#!/bin/bash
# run.sh SHARDS OUTPUT: train the shipped hiera_nano from random weights, 80 minutes on one core.
#
# Five runs, each of which starts from the weights of the one before. The same command continues after an interruption.
set -eu
cd "$(dirname "$0")/../.."
start=random
for phase in prompts stills clips long_clips polish; do
    "${PYTHON:-python}" train.py --config-dir=recipes/pretrain_nano experiment="$phase" "data.shards=$1" \
        "output=$2/$phase" "start=$start" resume=auto
    start="$2/$phase/checkpoints/last.ckpt"
done
