#!/usr/bin/env bash
# Run a script under Slurm, one task per GPU: bash slurm.sh SCRIPT PARTITION JOB_NAME [arguments of the script]
#
# GPUS (8) in all, GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS: further flags of srun; PYTHON names the interpreter.
# The slurm_*.sh scripts of detection/ and segmentation/ call this one.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=$1 partition=$2 job=$3
shift 3
command -v srun >/dev/null || { echo "error: no srun here: is this a Slurm cluster? dist_*.sh do without" >&2; exit 2; }

gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
source "$here/../../classification/tools/common.sh"
# SRUN_ARGS holds several flags.
# shellcheck disable=SC2086
exec srun --partition "$partition" --job-name "$job" --gres "gpu:$((gpus < per_node ? gpus : per_node))" --ntasks "$gpus" \
    --ntasks-per-node "$((gpus < per_node ? gpus : per_node))" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} "$python" -u "$script" "$@" --launcher slurm
