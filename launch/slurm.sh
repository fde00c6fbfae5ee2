#!/usr/bin/env bash
# Two machines with eight GPUs each, one process for each GPU, which is what JAX expects of Slurm:
#
#     sbatch launch/slurm.sh --config configs/synthetic.py --workdir /shared/runs/synthetic
#
# --workdir is on a file system that all machines share, or gs:// or s3://. Two minutes before the time is up, or when
# the job is preempted, all processes save the same step and end with code 143; the job goes back
# into the queue and carries on from there. So it does when a machine is lost.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun --kill-on-bad-exit=0 python train.py "$@"
code=$?
# 2: a mistake in the command, which another start would not mend.
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then
  [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
