#!/usr/bin/env bash
# The stages of a recipe in a row: pretraining, then every tuning that belongs to it.
#
#   launch/two_stage.sh METHOD RECIPE [--field value ...] [-- --field value ...]
#   launch/two_stage.sh flip vit-l16-laion400m --data.train 'laion/{00000..41407}.tar' \
#       --data.tokenizer.vocab vocab.txt --engine.deepspeed-config ds_configs/zero1.json \
#       -- --engine.checkpoint-activations
#
# Fields before the lonely -- go to all stages, those behind it to the tunings alone.
#
# RUN        folder; the stages go to RUN/pretraining, RUN/tuning and so on
#            (default: runs/METHOD-RECIPE)
# TUNING     recipes of the later stages, in order (default: every RECIPE-tuning...)
# LAUNCHER   script of this folder that starts them: deepspeed (default) or accelerate
# PROCESSES  and HOSTFILE: as for that script
#
# After an interruption the same command continues: a finished stage has nothing left to do, the
# next goes on from its newest checkpoint. A tuning sees several times the tokens and so needs more
# memory per sample: give it more processes, --engine.accumulate or --engine.checkpoint-activations.
set -euo pipefail
usage() {
    sed -n '2,20s/^# \{0,1\}//p' "$(dirname "$0")/two_stage.sh" >&2
    exit 2
}
if [ $# -lt 2 ] || [ "${1#-}" != "$1" ] || [ "${2#-}" != "$2" ]; then usage; fi
if [ "${1%.*}" != "$1" ]; then
    echo "error: $1 names one script, but both stages here are started by frugal.METHOD.train;" \
        "start them one after the other with ${LAUNCHER:-deepspeed}.sh" >&2
    exit 2
fi
method=$1 recipe=${2//_/-}
shift 2

all=() tuning_only=() seen=0
for word in "$@"; do
    case $word in
        --run.dir | --run.dir=* | --run.start[-_]from | --run.start[-_]from=*)
            echo "error: ${word%%=*} is set for each stage here; give RUN=folder instead" >&2
            exit 2
            ;;
        --)
            seen=1
            continue
            ;;
    esac
    if [ "$seen" -eq 0 ]; then all+=("$word"); else tuning_only+=("$word"); fi
done

launcher=${LAUNCHER:-deepspeed}
case $launcher in
    deepspeed | accelerate) ;;
    *)
        echo "error: LAUNCHER is $launcher; choose deepspeed or accelerate" >&2
        exit 2
        ;;
esac
start=$(dirname "$0")/$launcher.sh
run=${RUN:-runs/$method-$recipe}
tunings=${TUNING:-$(python -c '
import importlib, sys
recipes = importlib.import_module(f"frugal.{sys.argv[1]}.recipes").RECIPES
print(*[name for name in recipes if name.startswith(sys.argv[2] + "-tuning")])
' "$method" "$recipe")}

# puts the command line of a stage into "words" and its folder into "folder"
stage() {
    local before=${folder:-}
    if [ "$1" = "$recipe" ]; then
        folder=$run/pretraining
        words=("$recipe" "${all[@]}" --run.dir "$folder")
    else
        folder=$run/${1#"$recipe-"}
        words=("$1" "${all[@]}" "${tuning_only[@]}" --run.dir "$folder" --run.start-from "$before")
    fi
}

# a slip in what a later stage is told must not come to light after days of pretraining
for name in $recipe $tunings; do
    stage "$name"
    python -c '
import importlib, sys
from frugal.common.cli import read_command_line, run_politely
method, *words = sys.argv[1:]
recipes = importlib.import_module(f"frugal.{method}.recipes").RECIPES
program = f"python -m frugal.{method}.train"
run_politely(lambda: read_command_line(recipes, program=program, arguments=words))
' "$method" "${words[@]}"
done

# set -e: a stage that was stopped or failed is not followed by the next
for name in $recipe $tunings; do
    stage "$name"
    bash "$start" "$method" "${words[@]}"
done
