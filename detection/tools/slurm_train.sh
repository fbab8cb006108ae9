#!/usr/bin/env bash
# Train under Slurm: [GPUS=8] bash slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [flags of train.py]
# --resume continues an interrupted run; slurm.sh describes other settings.
# In a batch job: sbatch --signal USR1@120 --requeue --open-mode append ... --wrap "exec bash tools/slurm_train.sh ..."
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ $# -lt 4 ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
if [[ ! -f $here/slurm.sh ]]; then
    echo "error: Slurm runs a copy of this script alone: sbatch ... --wrap \"exec bash tools/slurm_train.sh ...\"" >&2
    exit 2
fi
# A job that was queued again goes on, whatever its command says.
[[ ${SLURM_RESTART_COUNT:-0} -eq 0 ]] || set -- "$@" --resume
# The warning before the time limit. Within a job, the job's own one counts.
SRUN_ARGS="--signal=USR1@120 ${SRUN_ARGS:-}" exec bash "$here/slurm.sh" "$here/train.py" "$1" "$2" "$3" --work-dir "$4" "${@:5}"
