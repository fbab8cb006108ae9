#!/usr/bin/env bash
# Run a script in several processes: bash launch.sh SCRIPT GPUS [arguments of the script]
#
# One process per GPU; without a GPU, GPUS processes on the CPU (gloo). The dist_*.sh scripts of detection/ and
# segmentation/ call this one.
# Several nodes: run it on each, with NNODES, NODE_RANK (0 ...), MASTER_ADDR and MASTER_PORT or PORT (29500) set.
# PYTHON names the interpreter; default: the active environment's, else the project's .venv.
# With --resume and no file, workers that fail are restarted, MAX_RESTARTS (3) times, and continue.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../../classification/tools/common.sh"

script=$1
processes=$2
shift 2
[[ $processes =~ ^[1-9][0-9]*$ ]] ||
    fail "'$processes' is no number of GPUs: dist_train.sh CONFIG GPUS, dist_test.sh CONFIG CHECKPOINT GPUS"

restarts=0 # a checkpoint that is named would be resumed again and again
[[ ! "$* " =~ \ --resume(=auto\ |\ auto\ |\ -|\ $) ]] || restarts=${MAX_RESTARTS:-3}
share_cores "$processes"
remember_signals
run_workers "$processes" "$restarts" "$script" "$@" --launcher pytorch
