#!/bin/bash
# One run on several machines with Slurm: sbatch examples/slurm.sh --agent grpo --model M --reward R --prompts FILE ...
#
# One launcher a machine, which starts a process for each GPU; all of them share one run. The folder of the run and the
# model must be on a disk that every machine sees. Sent again after a time limit it goes on from the last checkpoint:
# Slurm warns two minutes before the limit, and the run finishes its update and saves.
#SBATCH --job-name=textrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
set -euo pipefail

RUN=${RUN:-runs/$SLURM_JOB_NAME}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

if [ -f "$RUN/config.json" ]; then
    arguments=(--resume "$RUN")
else
    arguments=(--run-dir "$RUN" "$@")
fi

exec srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29500" \
    -m agents.cli train "${arguments[@]}"
