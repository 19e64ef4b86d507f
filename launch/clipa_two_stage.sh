#!/usr/bin/env bash
# CLIPA's pre-training on few tokens, then its fine-tunings in order: two_stage.sh clipa RECIPE ...
#
# A v2 recipe is tuned at 224 and then at 336 pixels; TUNING=vit-h14-i36-t8-tuning-224 stops there.
set -euo pipefail
exec bash "$(dirname "$0")/two_stage.sh" clipa "$@"
