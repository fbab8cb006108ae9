#!/usr/bin/env bash
# Train with several processes: bash distributed_train.sh NUM_GPUS DATA_DIR --model lit_ti [flags of train.py]
#
# One process per GPU; without a GPU, NUM_GPUS processes on the CPU (gloo).
# Several nodes: run it on each, with NNODES, NODE_RANK (0 ...), MASTER_ADDR and MASTER_PORT (29500) set.
# PYTHON names the interpreter; default: the active environment's, else the project's .venv.
# The same command continues an interrupted run (--resume auto). Workers that fail are restarted, MAX_RESTARTS (3)
# times. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save and exit with status 75.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/tools/common.sh"

[[ $# -ge 1 && $1 != -h && $1 != --help ]] || { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
processes=$1
shift
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "the number of processes comes first, and '$processes' is none: distributed_train.sh 8 DATA_DIR --model lit_ti"
[[ $# -ge 1 ]] || fail "which data? distributed_train.sh $processes DATA_DIR --model lit_ti"

"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    fail "$python has no torch: make the project's environment with setup_env.sh, or name another Python with PYTHON"

find_nodes
share_cores "$processes"

# The same command starts a run or continues it.
if [[ " $* " != *" --resume "* && " $* " != *" --resume="* ]]; then
    set -- "$@" --resume auto
fi

remember_signals

# One process reports wrong input in one line. From torchrun it would come once per worker.
WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 "$python" "$here/train.py" "$@" --dry-run $((processes * ${NNODES:-1})) >/dev/null || {
    status=$?
    [[ -z $stop ]] || status=75
    exit "$status"
}
[[ -z $stop ]] || exit 75

run_workers "$processes" "${MAX_RESTARTS:-3}" "$here/train.py" "$@"
