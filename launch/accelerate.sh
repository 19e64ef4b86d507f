#!/usr/bin/env bash
# Train under accelerate on one machine.
#
#   launch/accelerate.sh METHOD RECIPE [--field value ...]
#   launch/accelerate.sh flip vit-b16-laion400m --data.train 'laion/{00000..41407}.tar'
#
# METHOD starts frugal.METHOD.train; with a dot, as in milan.pretrain, it names the script itself.
#
# PROCESSES  processes on this machine (default: GPUs; 1 without a GPU)
#
# On CPU `accelerate launch` starts one process whatever it is told, so several CPU processes are
# started by torchrun here; the training script is the same.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
case $1 in *.*) module=frugal.$1 ;; *) module=frugal.$1.train ;; esac
shift

if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
    processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
    multi=()
    if [ "$processes" -gt 1 ]; then multi=(--multi_gpu); fi
    exec accelerate launch "${multi[@]}" --num_machines 1 --mixed_precision no \
        --dynamo_backend no --num_processes "$processes" -m "$module" "$@"
fi
processes=${PROCESSES:-1}
if [ "$processes" -gt 1 ]; then
    exec torchrun --standalone --nproc_per_node "$processes" -m "$module" "$@"
fi
exec accelerate launch --cpu --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_processes 1 -m "$module" "$@"
