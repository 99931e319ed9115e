#!/usr/bin/env bash
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@HOSTS@
#SBATCH --ntasks-per-node=@TASKS@
#SBATCH --cpus-per-task=@CPUS@
#SBATCH --mem=@MEMORY@
#SBATCH --time=@HOURS@:00:00
#SBATCH --output=@LOGS@/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@@GRACE@
@OPTIONS@
# @NAME@: a process a task. Before its time is over, or when it is preempted, it writes a checkpoint and queues again.
set -euo pipefail
# shellcheck source=/dev/null
@ENVIRONMENT@
@NEEDED@
@VARIABLES@

asked=0
step=
# The batch script is asked, and hands it on to all tasks.
trap 'asked=1; if [[ -n $step ]]; then kill -TERM "$step" 2>/dev/null || true; fi' TERM

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Number and index of the processes, and the GPU of each, are found in Slurm's variables.
srun --kill-on-bad-exit=1 @RUN@ --coordinator="${hosts%%$'\n'*}:@PORT@" &
step=$!
status=0
wait "$step" || status=$?
# A signal ends `wait`, not the step.
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done
# 2 is a mistake of the user, which another start does not mend.
if ((status == 0 || status == 2)); then exit "$status"; fi
if ((${SLURM_RESTART_COUNT:-0} < @RESTARTS@)); then
  echo "@NAME@: ended with code $status$( ((asked)) && echo ' as asked'), queued again"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
