#!/usr/bin/env bash
# FLIP's masked pretraining, then the unmasked tuning of its result: two_stage.sh flip RECIPE ...
#
# TUNING is RECIPE-tuning; set it to large-tuning-336 to tune on another grid instead. Whole images
# need twice the memory of half-masked ones.
set -euo pipefail
if [ $# -gt 0 ]; then export TUNING=${TUNING:-${1//_/-}-tuning}; fi
exec bash "$(dirname "$0")/two_stage.sh" flip "$@"
