#!/usr/bin/env bash
# Train on a SLURM cluster, one task per GPU. A job that is told to stop writes a checkpoint and
# is queued again; the same command continues the run.
#
#   sbatch --nodes 8 launch/slurm.sh METHOD RECIPE [--field value ...]
#   sbatch --nodes 8 launch/slurm.sh flip vit-l16-laion400m --data.train '...' \
#       --engine.deepspeed-config ds_configs/zero2.json --run.dir runs/l16
#
# METHOD starts frugal.METHOD.train; with a dot, as in milan.pretrain, it names the script itself.
#SBATCH --job-name=frugal
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
case $1 in *.*) module=frugal.$1 ;; *) module=frugal.$1.train ;; esac
shift

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
# ranks as every engine reads them, from what SLURM gives each task
code=0
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m "$@"
' launch "$module" "$@" || code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
