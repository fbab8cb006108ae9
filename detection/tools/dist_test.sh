#!/usr/bin/env bash
# Evaluate on several GPUs, or in several processes on a CPU: bash dist_test.sh CONFIG CHECKPOINT GPUS [flags of test.py]
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ $# -lt 3 ]]; then
    sed -n '2s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
exec bash "$here/launch.sh" "$here/test.py" "$3" "$1" "$2" "${@:4}"
