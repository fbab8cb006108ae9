#!/usr/bin/env bash
# Train under Slurm: [GPUS=8] bash slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [flags of train.py]
# --resume continues an interrupted run; slurm.sh describes other settings.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ $# -lt 4 ]]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
exec bash "$here/slurm.sh" "$here/train.py" "$1" "$2" "$3" --work-dir "$4" "${@:5}"
