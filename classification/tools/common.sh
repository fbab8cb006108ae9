# Sourced by the launch scripts of all tasks.

# Sets `python` to the interpreter: PYTHON, else the active environment's, else the project's .venv.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} && -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
fi

# share_cores PROCESSES: gives each process its share of the cores as threads, 8 at most.
share_cores() {
    local threads=$(($(getconf _NPROCESSORS_ONLN) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}
}
