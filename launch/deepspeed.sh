#!/usr/bin/env bash
# Train under the deepspeed launcher, on every GPU of this machine, or on its cores without one.
#
#   launch/deepspeed.sh METHOD RECIPE [--field value ...]
#   launch/deepspeed.sh flip vit-l16-laion400m --data.train 'laion/{00000..41407}.tar' \
#       --engine.deepspeed-config ds_configs/zero2.json --run.dir runs/l16
#
# METHOD starts frugal.METHOD.train; with a dot, as in milan.pretrain, it names the script itself.
#
# PROCESSES  processes on this machine (default: GPUs, else cores)
# HOSTFILE   several machines: a file with a line "host slots=8" for each
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
case $1 in *.*) module=frugal.$1 ;; *) module=frugal.$1.train ;; esac
shift

if [ -n "${HOSTFILE:-}" ]; then
    exec deepspeed --hostfile "$HOSTFILE" --module "$module" "$@"
fi
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
    processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
else
    processes=${PROCESSES:-$(nproc)}
fi
# a free port, so that two runs on one machine do not meet
port=$(python -c 'from frugal.common.ports import free_port; print(free_port())')
exec deepspeed --num_accelerators "$processes" --master_port "$port" \
    --module "$module" "$@"
