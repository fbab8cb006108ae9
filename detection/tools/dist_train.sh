#!/usr/bin/env bash
# Train on several GPUs, or in several processes on a CPU: bash dist_train.sh CONFIG GPUS [flags of train.py]
# --resume continues an interrupted run; launch.sh describes several nodes and other settings.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ $# -lt 2 ]]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
exec bash "$here/launch.sh" "$here/train.py" "$2" "$1" "${@:3}"
