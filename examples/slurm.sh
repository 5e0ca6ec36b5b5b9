#!/bin/bash
# The paper's 7B run on two nodes of 8 GPUs. The weights are sharded within a node and copied across.
#     sbatch examples/slurm.sh        from the repository's root, in the environment of the run
# A job that ends before the run does has saved. Submit it again to go on.
#SBATCH --job-name=drgrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=drgrpo-%j.log
set -euo pipefail

mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="${NODES[0]}:29500" \
    train.py --recipe oat_zero_7b --dp-replicate 2 --max-hours 23.5 --out runs/oat_zero_7b "$@"
