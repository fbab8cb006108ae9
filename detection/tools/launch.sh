#!/usr/bin/env bash
# Run a script in several processes: bash launch.sh SCRIPT GPUS [arguments of the script]
#
# One process per GPU; without a GPU, GPUS processes on the CPU (gloo). The dist_*.sh scripts of detection/ and
# segmentation/ call this one.
# Several nodes: run it on each, with NNODES, NODE_RANK (0 ...), MASTER_ADDR and MASTER_PORT or PORT (29500) set.
# PYTHON names the interpreter; default: the active environment's, else the project's .venv.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=$1
processes=$2
shift 2
if [[ ! $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "error: '$processes' is no number of GPUs: dist_train.sh CONFIG GPUS, dist_test.sh CONFIG CHECKPOINT GPUS" >&2
    exit 2
fi

source "$here/../../classification/tools/common.sh"

if [[ ${NNODES:-1} -gt 1 ]]; then
    place=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}"
        --master-port "${MASTER_PORT:-${PORT:-29500}}")
else
    place=(--standalone)
fi
share_cores "$processes"

# Wrong input: workers put their exit status here, and torchrun does not bury their one line under its report.
LITVIT_STATUS_FILE=$(mktemp)
export LITVIT_STATUS_FILE
trap 'rm -f "$LITVIT_STATUS_FILE"' EXIT
status=0
"$python" -m torch.distributed.run --nproc-per-node "$processes" "${place[@]}" "$script" "$@" --launcher pytorch || status=$?
[[ ! -s $LITVIT_STATUS_FILE ]] || status=$(<"$LITVIT_STATUS_FILE")
exit "$status"
