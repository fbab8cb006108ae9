#!/usr/bin/env bash
# Makes the project's virtual environment: see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: setup_env.sh [DIR] [--core]

Makes a virtual environment with the versions that constraints.txt pins, and installs the project into it, editable.
Nothing is compiled. Running it again is quick; what is out of date is brought up to date, and an environment whose set-up
was interrupted is made again.

  DIR       the environment's folder (default: LIT_VENV, else .venv next to this script)
  --core    classification only (default: detection, segmentation and export too)

  LIT_PYTHON names the Python of the environment, 3.10 to 3.14 (default: python3, else python3.13 ... python3.10)
HELP
}

say() { echo "setup: $*"; }

die() {
    echo "error: $*" >&2
    exit "${status:-1}"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mode=full
folders=()
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit 0 ;;
        --core) mode=core ;;
        -*) status=2 die "unknown flag '$argument' (setup_env.sh --help lists the flags)" ;;
        *) folders+=("$argument") ;;
    esac
done
((${#folders[@]} < 2)) || status=2 die "one folder at most, got '${folders[0]}' and '${folders[1]}'"
venv=$(realpath -ms "${folders[0]:-${LIT_VENV:-$root/.venv}}")
python=$venv/bin/python
log=$venv/lit-setup.log     # exists as soon as this script has begun to make the environment
stamp=$venv/lit-setup.txt   # exists when the environment is complete: for which checkout, and what is in it

# Prints the interpreter behind $1, a virtual environment's Python included; fails if the pins do not fit it.
base_python() {
    "$1" -I -c 'import sys; print(sys._base_executable); sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null
}

find_python() {
    local name
    if [[ -n ${LIT_PYTHON:-} ]]; then
        base_python "$LIT_PYTHON" || die "LIT_PYTHON=$LIT_PYTHON is not Python 3.10 to 3.14"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if base_python "$name"; then return; fi
    done
    die "no Python 3.10 to 3.14 found; install one, or name it with LIT_PYTHON"
}

# The stamp names the checkout, since the installation is editable, and the folder, which scripts in bin/ hold.
is_ready() {
    [[ -x $python && $(cat "$stamp" 2>/dev/null) =~ ^"$venv of $root: "(.*)$ ]] &&
        [[ ${BASH_REMATCH[1]} == full || ${BASH_REMATCH[1]} == "$mode" ]] &&
        [[ $stamp -nt $root/constraints.txt && $stamp -nt $root/pyproject.toml && $stamp -nt $root/setup_env.sh ]]
}

# step TEXT COMMAND...: runs a slow command with its output in the log, and prints a line every 30 s.
step() {
    local text=$1 result=0
    shift
    say "$text"
    (for ((seconds = 30; ; seconds += 30)); do sleep 30 >/dev/null 2>&1; say "  $seconds s"; done) &
    ticker=$!
    trap 'kill "$ticker" 2>/dev/null' EXIT
    "$@" >>"$log" 2>&1 || result=$?
    kill "$ticker"
    trap - EXIT
    ((result)) || return 0
    tail -n 20 "$log" >&2
    die "failed: $text; the whole log is $log"
}

pip() { "$python" -I -m pip --disable-pip-version-check "$@"; }

if is_ready; then
    say "$venv is ready"
    exit 0
fi
if [[ -e $venv && ! -e $log && -n $(ls -A "$venv" 2>/dev/null || echo file) ]]; then
    die "$venv is not an environment that this script made; remove it, or name another folder"
fi
# None yet, one whose set-up was interrupted, one that was moved, or one whose Python is gone.
if [[ $(cat "$stamp" 2>/dev/null) != "$venv of "* ]] || ! base_python "$python" >/dev/null; then
    base=$(find_python)
    "$base" -I -c 'import ensurepip, venv' 2>/dev/null ||
        die "$base has no venv module; install Debian's python3-venv or the like"
    say "making $venv with $("$base" --version)"
    mkdir -p "$venv" 2>/dev/null && : >"$log" || die "cannot write to $venv"
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name lit-setup.log -exec rm -rf {} +
    "$base" -I -m venv "$venv" || die "could not make $venv with $base"
fi
rm -f "$stamp"

pins=$root/constraints.txt
tools=$(sed -n '/^# what builds/,/^$/s/^\([a-z]*\)==.*/\1/p' "$pins")
# shellcheck disable=SC2086
step "build tools" pip install -c "$pins" $tools
step "torch and classification (a minute or two, 3 GB to fetch)" \
    pip install -c "$pins" --no-build-isolation -e "$root[dev]"
needs="torch, torchvision, timm, sklearn, yaml, safetensors, tensorboard, torchmetrics, matplotlib, tqdm"
if [[ $mode == full ]]; then
    # mmcv's set-up compiles its operators where it sees torch. pip's isolated builds do not see it; its cache may hold
    # a compiled one from elsewhere.
    step "mmcv" pip install --no-cache-dir --build-constraint "$pins" --no-deps "$(grep '^onedl-mmcv==' "$pins")"
    step "detection, segmentation and export" pip install --no-deps --no-build-isolation -r "$pins"
    needs+=", onnx, onnxruntime, onnxscript, openvino, cv2, litvit.openmmlab, mmcv.ops, mmdet.apis, mmseg.apis"
fi
"$python" -I -c "import $needs" >>"$log" 2>&1 ||
    die "the environment does not import: $(tail -n 1 "$log"); remove $venv and run this again"
echo "$venv of $root: $mode" >"$stamp"
say "$venv is ready"
