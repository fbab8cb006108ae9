# Sourced by the launch scripts of all tasks.

# Sets `python` to the interpreter: PYTHON, else the active environment's, else the project's .venv.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} && -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
fi

fail() {
    echo "error: $1" >&2
    exit 2
}

# share_cores PROCESSES: gives each process its share of the cores as threads, 8 at most.
share_cores() {
    local threads=$(($(getconf _NPROCESSORS_ONLN) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}
}

# Sets `place`, the flags that tell torchrun about several nodes: NNODES, NODE_RANK (0 ...), MASTER_ADDR and MASTER_PORT
# or PORT (29500).
find_nodes() {
    place=(--standalone)
    [[ ${NNODES:-1} -gt 1 ]] || return 0
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs NODE_RANK and MASTER_ADDR too"
    place=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
        --master-port "${MASTER_PORT:-${PORT:-29500}}")
}

# Remembers in `stop` that a signal came, from this line on.
remember_signals() {
    command -v pkill >/dev/null || fail "pkill, which passes signals on, is not there: install procps"
    stop=""
    trap 'stop=yes' TERM INT USR1 HUP
}

# run_workers PROCESSES RESTARTS SCRIPT [ARGUMENT...]: runs a Python script in several processes, and exits with their
# status. Workers that fail are restarted, RESTARTS times.
#
# Workers answer the signals, not torchrun: they save, put their exit status into a file, and torchrun ends with them
# (litvit/processes.py draws the protocol).
run_workers() {
    local processes=$1 restarts=$2 torchrun status=0
    shift 2
    find_nodes
    LITVIT_STATUS_FILE=$(mktemp)
    export LITVIT_STATUS_FILE PET_SIGNALS_TO_HANDLE=SIGQUIT
    # On one node, restarted workers must not find the addresses of their predecessors in torchrun's own store.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    trap 'rm -f "$LITVIT_STATUS_FILE"' EXIT
    (
        trap '' TERM INT USR1 HUP
        export LITVIT_LAUNCHER=$BASHPID # torchrun, from the next line on
        exec "$python" -m torch.distributed.run --nproc-per-node "$processes" --max-restarts "$restarts" "${place[@]}" "$@"
    ) &
    torchrun=$!
    interrupt() { # a second Ctrl-C does not wait for anyone
        [[ -z $stop ]] || { pkill -KILL -P "$torchrun"; kill -KILL "$torchrun"; exit 130; }
        stop=yes
    }
    trap interrupt INT
    while kill -0 "$torchrun" 2>/dev/null; do # a trapped signal ends the wait, not the run
        if [[ -z $stop ]]; then
            wait "$torchrun" && status=0 || status=$?
        else # repeated: workers that start up do not listen yet
            pkill -TERM -P "$torchrun" || true
            sleep 1 || true # Slurm's signals reach it too
        fi
    done
    [[ -z $stop ]] || status=143 # where nobody saves, as in a test
    [[ ! -s $LITVIT_STATUS_FILE ]] || status=$(<"$LITVIT_STATUS_FILE")
    exit "$status"
}

# wait_for_step SRUN: waits for srun, by its process id, and sets `status` to its exit status.
wait_for_step() {
    while kill -0 "$1" 2>/dev/null; do # a trapped signal ends the wait, not the step
        wait "$1" || true
    done
    wait "$1" && status=0 || status=$?
}

# leave_interrupted FLAGS: has a batch job queue itself again, and exits with 75. In other jobs it says that the same
# command continues, with FLAGS. So it does in a job that was cancelled and is COMPLETING: queueing would bring it back.
leave_interrupted() {
    trap '' TERM INT USR1 HUP # queueing again ends what is left of the job
    if [[ -n ${SLURM_JOB_ID:-} && $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]] &&
        scontrol requeue "$SLURM_JOB_ID"; then
        echo "interrupted: the job queues itself again"
    else
        echo "interrupted: the same command$1 continues"
    fi
    exit 75
}
