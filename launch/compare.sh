#!/usr/bin/env bash
# Plain CLIP and every method on the same scenes, at equal time and at equal FLOPs: draws two data
# sets, tries every stage shortly, trains what launch/compare.json lists, and writes
# runs/compare/compare.html.
#
#   launch/compare.sh [--option value ...]
#
# Options are those of python -m frugal.common.compare_methods, such as --seeds 3. After an
# interruption the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

draw=(python -m frugal.common.scenes --train-samples 20000 --image-size 40)
"${draw[@]}" --out data/compare/scenes
"${draw[@]}" --out data/compare/pool --irrelevant 0.8

python -m frugal.common.compare_methods "$@"
