#!/usr/bin/env bash
# Makes the project's virtual environment, or mends it: see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: setup_env.sh [DIR] [--core]

Makes a virtual environment with the versions that constraints.txt pins, and installs the project into it, editable.
Running it again is quick; it mends an environment that is broken or out of date.

  DIR       the environment's folder (default: LIT_VENV, else .venv beside this script)
  --core    classification only: a minute or two, nothing is compiled
            (default: detection and segmentation too; compiling mmcv takes about 10 minutes on 2 cores, the first time)

  LIT_PYTHON names the Python to make it with, 3.10 to 3.14 (default: python3, else python3.13 ... python3.10)
HELP
}

say() { echo "setup: $*"; }

die() {
    echo "error: $*" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=""
mode=full
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit 0 ;;
        --core) mode=core ;;
        -*) echo "error: unknown flag '$argument' (setup_env.sh --help lists the flags)" >&2; exit 2 ;;
        *)
            if [[ -n $venv ]]; then
                echo "error: one folder at most, got '$venv' and '$argument'" >&2
                exit 2
            fi
            venv=$argument
            ;;
    esac
done
venv=${venv:-${LIT_VENV:-$root/.venv}}
venv=$(realpath -ms "$venv")
python=$venv/bin/python
stamp=$venv/lit-setup.txt
log=$venv/lit-setup.log

# Prints the path of the interpreter behind $1, a virtual environment's Python included; fails if the pins do not fit it.
base_python() {
    "$1" -I -c 'import sys; print(getattr(sys, "_base_executable", "")); sys.exit(not (3, 10) <= sys.version_info < (3, 15))' \
        2>/dev/null
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

# Prints what is wrong with the environment, a line a fault; nothing if it is as setup left it. With "mend" it makes pip
# forget the packages whose files are gone or changed, so that pip installs them again.
inspect() {
    "$python" -I - "$root" "$venv" "$stamp" "$mode" "$1" <<'PYTHON'
import hashlib, importlib.metadata, json, pathlib, platform, shutil, sys, sysconfig

root, venv, stamp = map(pathlib.Path, sys.argv[1:4])
mode, action = sys.argv[4:]
site = pathlib.Path(sysconfig.get_path("purelib"))


def whole(distribution):
    """Whether all files are there at their recorded size; bytecode may come and go."""
    if distribution.files is None:
        return False
    try:
        return all(
            f.size is None or f.suffix == ".pyc" or f.locate().stat().st_size == f.size for f in distribution.files
        )
    except OSError:
        return False


digest = hashlib.sha256()
for name in ("constraints.txt", "pyproject.toml", "setup_env.sh"):
    digest.update((root / name).read_bytes())
state = {
    "of": f"{digest.hexdigest()} Python {platform.python_version()} {venv} {root}",
    "mode": mode,
    "packages": {},
}
# Where an installation was interrupted, pip leaves folders that begin with ~.
broken = list(site.glob("~*"))
for folder in site.glob("*.dist-info"):
    distribution = importlib.metadata.Distribution.at(folder)
    if whole(distribution):
        state["packages"][distribution.metadata["Name"]] = distribution.version
    else:
        broken.append(folder)
faults = [f"{folder.name.removesuffix('.dist-info')} (files are missing or changed)" for folder in broken]

if action == "mend":
    for path in broken:
        shutil.rmtree(path)
elif action == "record":
    stamp.write_text(json.dumps(state, indent=1) + "\n")
try:
    recorded = json.loads(stamp.read_text())
except (OSError, ValueError):
    recorded = {"of": None, "mode": None, "packages": {}}
if recorded["of"] != state["of"]:
    faults.append("not set up for this checkout as it is now")
elif (recorded["mode"], mode) == ("core", "full"):
    faults.append("detection and segmentation")
for name, version in recorded["packages"].items():
    if state["packages"].get(name) != version and not broken:
        faults.append(f"{name} (was {version}, is {state['packages'].get(name, 'gone')})")
print("\n".join(faults))
PYTHON
}

# step TEXT COMMAND...: runs a slow command with its output in the log, and a line every 30 s.
step() {
    local text=$1 start=$SECONDS status=0
    shift
    say "$text"
    (
        while sleep 30 >/dev/null 2>&1; do
            built=$(grep -o '\[[0-9]*/[0-9]*\]' "$log" | tail -n 1) || true
            say "  $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s ${built:+compiled $built}"
        done
    ) &
    local ticker=$!
    # shellcheck disable=SC2064
    trap "kill $ticker 2>/dev/null || true" EXIT
    "$@" >>"$log" 2>&1 || status=$?
    kill "$ticker" 2>/dev/null || true
    ((status == 0)) && return
    tail -n 20 "$log" >&2
    if grep -qE 'NewConnectionError|NameResolutionError|Temporary failure in name resolution|ConnectTimeout|ProxyError' "$log"; then
        die "cannot reach the package registry; check the network and pip's settings, then run this again"
    elif grep -q 'No space left on device' "$log"; then
        die "the disk is full; --core needs about 7 GB, everything about 8 GB"
    fi
    die "failed: $text; the whole log is $log"
}

pip() { "$python" -I -m pip --disable-pip-version-check "$@"; }

# Sets mmcv_work to what installing mmcv means here; refuses early where it is to be compiled and cannot be.
plan_mmcv() {
    local tag cxx=${CXX:-c++}
    tag=$("$python" -I -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    if pip show -q onedl-mmcv 2>/dev/null; then
        mmcv_work="a minute"
    elif pip cache list --format=abspath onedl_mmcv 2>/dev/null | grep -q "$tag"; then
        mmcv_work="a minute, with the mmcv that pip compiled before"
    else
        mmcv_work="compiles mmcv: about 10 minutes on 2 cores"
        # CXX may hold a command and its flags.
        # shellcheck disable=SC2086
        $cxx -fsyntax-only -x c++ - </dev/null 2>/dev/null ||
            die "no C++ compiler ($cxx), which mmcv needs; install g++ (--core does without)"
        # shellcheck disable=SC2086
        $cxx -fsyntax-only -I"$("$python" -I -c 'import sysconfig; print(sysconfig.get_path("include"))')" -x c++ - \
            <<<'#include <Python.h>' 2>/dev/null ||
            die "no Python headers, which mmcv needs; install Debian's python3-dev or the like (--core does without)"
    fi
}

# mmcv builds CUDA operators where it sees a GPU, and fails where the toolkit is not there or not of torch's version.
hide_gpu_from_mmcv() {
    local toolkit torch_cuda
    toolkit=$("$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")" --version 2>/dev/null |
        sed -n 's/.*release \([0-9]*\)\..*/\1/p') || true
    torch_cuda=$("$python" -I -c 'import torch; print((torch.version.cuda or "").split(".")[0])')
    if [[ -z $toolkit || $toolkit != "$torch_cuda" ]]; then
        export CUDA_VISIBLE_DEVICES=""
        if command -v nvidia-smi >/dev/null; then
            say "mmcv gets its CPU operators only: no CUDA toolkit $torch_cuda (nvcc) here"
        fi
    fi
}

install_all() (
    hide_gpu_from_mmcv
    step "detection and segmentation ($mmcv_work)" \
        pip install -v --no-deps --no-build-isolation -r "$root/constraints.txt"
)

imports() { "$python" -I -c "import $1" >>"$log" 2>&1; }

# --- what is there ---
if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv" 2>/dev/null || echo file) ]]; then
    die "$venv is there and is not a virtual environment; remove it, or name another folder"
fi
if [[ -x $python ]] && "$python" -I -c 'import pip' 2>/dev/null; then
    base_python "$python" >/dev/null || die "$venv has not Python 3.10 to 3.14; remove it, or name another folder"
    faults=$(inspect check)
    if [[ -z $faults ]]; then
        say "$venv is ready"
        exit 0
    fi
    # Scripts in bin/ name the environment's folder: one that was moved is made anew.
    if [[ -e $stamp ]] && ! grep -qF " $venv $root" "$stamp" && ! grep -qF "$venv/" "$venv/bin/pip"; then
        faults=""
    fi
else
    faults=""
fi

if [[ -z $faults ]]; then
    base=$(find_python)
    "$base" -I -c 'import ensurepip, venv' 2>/dev/null ||
        die "$base has no venv module; install Debian's python3-venv or the like"
    say "making $venv with $("$base" --version)"
    # pyvenv.cfg stays, so that an interruption leaves what the next run knows as an environment.
    mkdir -p "$venv" && touch "$venv/pyvenv.cfg" || die "cannot write to $venv"
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name pyvenv.cfg -exec rm -rf {} +
    "$base" -I -m venv "$venv" || die "could not make $venv with $base"
    : >"$log"
else
    say "mending $venv: $(head -n 1 <<<"$faults")$([[ $faults == *$'\n'* ]] && echo ", and more")"
    : >"$log"
    inspect mend >/dev/null
fi

# --- what is to be there ---
tools=$(sed -n '/^# what builds/,/^$/s/^\([a-z]*\)==.*/\1/p' "$root/constraints.txt")
[[ $mode == core ]] || plan_mmcv
# shellcheck disable=SC2086
step "build tools" pip install -c "$root/constraints.txt" $tools
step "torch and classification (a minute or two, 3 GB to fetch)" \
    pip install -c "$root/constraints.txt" --no-build-isolation -e "$root[dev]"
imports "torch, torchvision, timm, sklearn, yaml, safetensors, tensorboard, tqdm" ||
    die "the environment does not import: $(tail -n 1 "$log")"
if [[ $mode == full ]]; then
    install_all
    # pip keeps the wheel that it compiled, also where that was for another torch.
    if ! imports "mmcv.ops"; then
        say "the compiled mmcv does not fit this torch"
        pip uninstall -y -q onedl-mmcv >>"$log" 2>&1
        pip cache remove onedl_mmcv >>"$log" 2>&1 || true
        plan_mmcv
        install_all
    fi
    imports "cv2, mmcv.ops, mmdet.apis, mmseg.apis, torchmetrics" ||
        die "the environment does not import: $(tail -n 1 "$log")"
fi
faults=$(inspect record)
[[ -z $faults ]] || die "the environment is not whole: $(head -n 1 <<<"$faults")"
say "$venv is ready"
