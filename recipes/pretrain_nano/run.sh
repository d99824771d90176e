#!/bin/bash
# run.sh SHARDS OUTPUT: train the shipped hiera_nano from random weights, about an hour on two cores.
#
# A curriculum of five runs, each of which starts from the weights of the one before. Given again, it goes on.
set -eu
cd "$(dirname "$0")/../.."
start=random
for phase in prompts stills clips long_clips polish; do
    "${PYTHON:-python}" train.py --config-dir=recipes/pretrain_nano experiment="$phase" "data.shards=$1" \
        "output=$2/$phase" "start=$start" resume=auto
    start="$2/$phase/checkpoints/last.ckpt"
done
