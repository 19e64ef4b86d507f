#!/usr/bin/env bash
# CiT in one command: draws a pool of scenes of which four in five have nothing to do with the task,
# trains a small CLIP that picks its own pairs, evaluates it, counts what it was trained on, and
# writes runs/cit-demo/report.html.
#
#   launch/cit_demo.sh [--field value ...]
#
# DATA       folder of the pool (default: data/scenes_pool)
# RUN        run directory (default: runs/cit-demo)
# ENCODER    run of FLIP's demo, whose image tower is taken and left as it is (default: none, all of
#            the model is trained from scratch)
# LAUNCHER   script of this folder that starts it: deepspeed (default) or accelerate
set -euo pipefail
cd "$(dirname "$0")/.."

data=${DATA:-data/scenes_pool}
run=${RUN:-runs/cit-demo}
launcher=${LAUNCHER:-deepspeed}
case $launcher in
    deepspeed) engine=(--engine.deepspeed-config ds_configs/zero1.json) ;;
    accelerate) engine=() ;;
    *)
        echo "error: LAUNCHER is $launcher; choose deepspeed or accelerate" >&2
        exit 2
        ;;
esac
encoder=()
if [ -n "${ENCODER:-}" ]; then
    encoder=(--objective.image-weights "$ENCODER" --objective.train-image none)
fi

python -m frugal.common.scenes --out "$data" --train-samples 40000 --image-size 40 --irrelevant 0.8

bash "launch/$launcher.sh" cit demo "${engine[@]}" "${encoder[@]}" \
    --data.train "$data/train" \
    --data.metadata.sources "$data/zero_shot/classnames.txt" \
    --evaluation.0.data "$data" \
    --evaluation.1.data "$data" \
    --evaluation.2.data "$data" \
    --run.dir "$run" "$@"

python -m frugal.cit.trained_pairs count "$run" --out "$run/pairs.parquet"
python -m frugal.common.report "$run" --title "CiT on scenes" \
    --next "watch it in tensorboard: tensorboard --logdir $run" \
    --next "copy the pairs it chose to shards: python -m frugal.cit.trained_pairs write $run/pairs.parquet --out $run/pairs" \
    --next "train on your own pool: launch/deepspeed.sh cit yfcc15m-in1k-moco-b16-one-gpu --help"
