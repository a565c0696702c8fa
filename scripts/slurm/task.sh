#!/usr/bin/env bash
# What eval.sbatch has srun start once per GPU: runs a command as one process of a torch.distributed
# run, with MASTER_ADDR and MASTER_PORT as they are.
set -euo pipefail
export RANK=${SLURM_PROCID:?only srun starts this} LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
