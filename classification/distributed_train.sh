#!/usr/bin/env bash
# Train with several processes: bash distributed_train.sh NUM_GPUS DATA_DIR --model lit_ti [flags of train.py]
#
# One process per GPU; without a GPU, NUM_GPUS processes on the CPU (gloo).
# Several nodes: run it on each, with NNODES, NODE_RANK (0 ...), MASTER_ADDR and MASTER_PORT (29500) set.
# PYTHON names the interpreter; default: the active environment's, else the project's .venv.
# The same command continues an interrupted run (--resume auto). Workers that fail are restarted, MAX_RESTARTS (3)
# times. SIGTERM, SIGUSR1 and Ctrl-C save and exit with status 75.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -h && $1 != --help ]] || { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
processes=$1
shift
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "the number of processes comes first, and '$processes' is none: distributed_train.sh 8 DATA_DIR --model lit_ti"
[[ $# -ge 1 ]] || fail "which data? distributed_train.sh $processes DATA_DIR --model lit_ti"

source "$here/tools/common.sh"

"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    fail "$python has no torch: make the project's environment with setup_env.sh, or name another Python with PYTHON"

nodes=${NNODES:-1}
if [[ $nodes -gt 1 ]]; then
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes needs NODE_RANK and MASTER_ADDR too"
    place=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    place=(--standalone)
fi

share_cores "$processes"

# The same command starts a run or continues it.
if [[ " $* " != *" --resume "* && " $* " != *" --resume="* ]]; then
    set -- "$@" --resume auto
fi

command -v pkill >/dev/null || fail "pkill, which passes signals on, is not there: install procps"
stop=""
trap 'stop=yes' TERM INT USR1

# One process reports wrong input in one line. From torchrun it would come once per worker.
WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 "$python" "$here/train.py" "$@" --dry-run $((processes * nodes)) >/dev/null || {
    status=$?
    [[ -z $stop ]] || status=75
    exit "$status"
}
[[ -z $stop ]] || exit 75

# Workers answer the signals, not torchrun: they save, put their exit status here, and torchrun ends with them
# (litvit/processes.py draws the protocol).
LITVIT_STATUS_FILE=$(mktemp)
export LITVIT_STATUS_FILE PET_SIGNALS_TO_HANDLE=SIGHUP,SIGQUIT
# On one node, restarted workers must not find the addresses of their predecessors in torchrun's own store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
trap 'rm -f "$LITVIT_STATUS_FILE"' EXIT
(
    trap '' TERM INT USR1
    export LITVIT_LAUNCHER=$BASHPID # torchrun, from the next line on
    exec "$python" -m torch.distributed.run --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-3}" "${place[@]}" \
        "$here/train.py" "$@"
) &
torchrun=$!
interrupt() { # a second Ctrl-C does not wait for anyone
    [[ -z $stop ]] || { pkill -KILL -P "$torchrun"; kill -KILL "$torchrun"; exit 130; }
    stop=yes
}
trap interrupt INT
status=0
while kill -0 "$torchrun" 2>/dev/null; do # a trapped signal ends the wait, not the run
    wait "$torchrun" && status=0 || status=$?
    while [[ -n $stop ]] && kill -0 "$torchrun" 2>/dev/null; do # repeated: workers that start up do not listen yet
        pkill -TERM -P "$torchrun" || true
        sleep 1
    done
done
[[ -z $stop ]] || { wait "$torchrun" && status=0 || status=$?; }
[[ ! -s $LITVIT_STATUS_FILE ]] || status=$(<"$LITVIT_STATUS_FILE")
exit "$status"
