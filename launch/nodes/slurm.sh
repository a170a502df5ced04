#!/usr/bin/env bash
# Train on several machines with SLURM, one task per GPU. Two minutes before the time limit, SLURM sends SIGUSR1: the
# run saves and exits with code 75, and the job is requeued and resumes. --requeue does the same after a node failure.
# With --restarts N after the script, lost ranks are restarted without requeueing; with `sbatch --no-kill` as well, the
# run continues without a node that fails, unless it is the first.
#   sbatch --nodes 4 launch/nodes/slurm.sh pretrain/main.py --config configs/pretrain/photos.yaml
#SBATCH --job-name=fcmae
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the project folder}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
code=0 kill=1
if [[ " $* " == *" --restarts"[\ =]* ]]; then kill=0; fi # the agent of each node decides
srun --kill-on-bad-exit="$kill" .venv/bin/python "$@" || code=$?
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
