#!/usr/bin/env bash
# Train under Slurm: sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 slurm_train.sh DATA_DIR --model lit_b [flags of train.py]
#
# Two minutes before the time limit, or when the job is preempted, the run saves and the job queues itself again; it
# continues where it was. One task per node, which starts one process per GPU. All nodes must share the folder of --output.
#SBATCH --job-name=lit
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo "error: not in a Slurm job: submit this script with sbatch" >&2
    exit 2
fi
# Slurm runs a copy of the script: the folder is the one it was submitted from, unless LIT_HOME names another.
here=${LIT_HOME:-$SLURM_SUBMIT_DIR}
if [[ ! -f $here/distributed_train.sh ]]; then
    echo "error: no distributed_train.sh in $here: submit from classification/, or set LIT_HOME to it" >&2
    exit 2
fi
source "$here/tools/common.sh"
processes=${SLURM_GPUS_ON_NODE:-1}
export NNODES=$SLURM_JOB_NUM_NODES
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

# srun does not take the CPUs per task from the job.
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$0" "$@"' "$here/distributed_train.sh" "$processes" "$@" &
step=$!
interrupt() { # again and again, as the step may not have begun
    until scancel --signal=USR1 "$SLURM_JOB_ID.0" || ! kill -0 "$step" 2>/dev/null; do
        sleep 1 || true
    done
}
trap interrupt TERM USR1
wait_for_step "$step"
# 138: the signal ended the launcher before that listened.
[[ $status -ne 75 && $status -ne 138 ]] || leave_interrupted ""
exit "$status"
