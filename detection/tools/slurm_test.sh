#!/usr/bin/env bash
# Evaluate under Slurm: [GPUS=8] bash slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [flags of test.py]
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ $# -lt 4 ]]; then
    sed -n '2s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
if [[ ! -f $here/slurm.sh ]]; then
    echo "error: Slurm runs a copy of this script alone: sbatch ... --wrap \"exec bash tools/slurm_test.sh ...\"" >&2
    exit 2
fi
exec bash "$here/slurm.sh" "$here/test.py" "$1" "$2" "$3" "$4" "${@:5}"
