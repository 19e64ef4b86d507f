#!/usr/bin/env bash
# The product in one command: draws a data set, pretrains FLIP at 50 % masking under the deepspeed
# launcher, tunes it on whole images, evaluates, and writes runs/demo/report.html.
set -euo pipefail
cd "$(dirname "$0")/.."

data=${DATA:-data/scenes}
run=${RUN:-runs/demo}
config=ds_configs/zero1.json

python -m frugal.common.scenes --out "$data" --train-samples 40000 --image-size 40

flags=(
    --data.train "$data/train"
    --evaluation.0.data "$data"
    --evaluation.1.data "$data"
    --evaluation.2.data "$data"
    --engine.deepspeed-config "$config"
)
bash launch/deepspeed.sh flip demo "${flags[@]}" --run.dir "$run/masked"
bash launch/deepspeed.sh flip demo-tuning "${flags[@]}" --run.dir "$run/unmasked" \
    --run.start-from "$run/masked"

python -m frugal.common.report "$run" --title "FLIP on scenes" \
    --next "watch it in tensorboard: tensorboard --logdir $run" \
    --next "measure the model again: python -m frugal.common.evaluate --checkpoint $run/unmasked --data $data" \
    --next "train without masking, for comparison: launch/deepspeed.sh flip demo --reduction.image.mask-ratio 0 --engine.deepspeed-config $config --run.dir runs/whole" \
    --next "train on your own shards: launch/deepspeed.sh flip vit-b16-laion400m --help"
