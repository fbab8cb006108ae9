#!/usr/bin/env bash
# Run a script under Slurm, one task per GPU: bash slurm.sh SCRIPT PARTITION JOB_NAME [arguments of the script]
#
# GPUS (8) in all, GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS: further flags of srun; PYTHON names the interpreter.
# The slurm_*.sh scripts of detection/ and segmentation/ call this one.
# SIGTERM, SIGUSR1, SIGHUP and Ctrl-C reach the tasks as SIGUSR1. If they save and exit with 75, so does this, and a batch
# job queues itself again.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../../classification/tools/common.sh"

script=$1 partition=$2 job=$3
shift 3
command -v srun >/dev/null || fail "no srun here: is this a Slurm cluster? dist_*.sh do without"
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
[[ $gpus =~ ^[1-9][0-9]*$ && $per_node =~ ^[1-9][0-9]*$ ]] ||
    fail "GPUS=$gpus and GPUS_PER_NODE=$per_node: both are numbers of GPUs, such as GPUS=8"
per_node=$((gpus < per_node ? gpus : per_node))
# Of each job its own: jobs may share a node.
export MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-$RANDOM} % 20000))}

# Tasks find each other by the variables that torchrun would set. One that dies ends the others after a minute, not at
# once: the first one to exit with 75 must not turn the status of the others into that of a killed task.
# SRUN_ARGS holds several flags.
# shellcheck disable=SC2016,SC2086
srun --partition "$partition" --job-name "$job" --gres "gpu:$per_node" --ntasks "$gpus" --ntasks-per-node "$per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=0 --wait=60 ${SRUN_ARGS:-} \
    bash -c 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
        export MASTER_ADDR RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        exec "$0" "$@"' "$python" -u "$script" "$@" --launcher pytorch &
step=$!
asked=""
interrupt() { # srun itself would kill the tasks on SIGTERM and SIGHUP. SIGUSR1 it passes on.
    if [[ $1 == INT && -n $asked ]]; then # a second Ctrl-C does not wait for anyone
        kill -TERM "$step"
        exit 130
    fi
    [[ $1 != INT ]] || asked=yes
    kill -USR1 "$step" 2>/dev/null
}
for signal in TERM INT USR1 HUP; do
    # shellcheck disable=SC2064
    trap "interrupt $signal" "$signal"
done
wait_for_step "$step"
[[ $status -ne 75 ]] || leave_interrupted " with --resume"
exit "$status"
