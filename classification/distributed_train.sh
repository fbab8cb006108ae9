#!/usr/bin/env bash
# Train with several processes: bash distributed_train.sh NUM_GPUS DATA_DIR --model lit_ti [flags of train.py]
#
# One process a GPU; where there is none, NUM_GPUS processes on the CPU (gloo).
# Several nodes: run it on each, with NNODES, NODE_RANK (0 ...), MASTER_ADDR and MASTER_PORT (29500) set.
# PYTHON names the interpreter; default: the active environment's, else the project's .venv.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -h && $1 != --help ]] || { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
processes=$1
shift
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "the number of processes comes first, and '$processes' is none: distributed_train.sh 8 DATA_DIR --model lit_ti"
[[ $# -ge 1 ]] || fail "which data? distributed_train.sh $processes DATA_DIR --model lit_ti"

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} && -x $here/../.venv/bin/python ]]; then
    python=$here/../.venv/bin/python
fi

nodes=${NNODES:-1}
if [[ $nodes -gt 1 ]]; then
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes needs NODE_RANK and MASTER_ADDR too"
    place=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    place=(--standalone)
fi

if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    threads=$(($(getconf _NPROCESSORS_ONLN) / processes))
    export OMP_NUM_THREADS=$((threads < 1 ? 1 : threads > 8 ? 8 : threads))
fi

# One process finds wrong input in one line; torchrun would bury it under every worker's.
"$python" "$here/train.py" "$@" --dry-run >/dev/null
exec "$python" -m torch.distributed.run --nproc-per-node "$processes" "${place[@]}" "$here/train.py" "$@"
