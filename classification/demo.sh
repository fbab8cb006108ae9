#!/usr/bin/env bash
# The demos, end to end, on real digits: a trained model and its top-1. `make demo` and `make demo-lvt` call it.
#   demo.sh        a LIT, its offset plots, and a page to explore it with
#   demo.sh lvt    an LVT, with token labels that the LIT of the first demo gives
set -euo pipefail

python=${PYTHON:-$(cd "${LIT_VENV:-$(dirname "$0")/../.venv}/bin" && pwd)/python}
cd "$(dirname "$0")"
root=$(cd .. && pwd)
data=$root/data/demo
image=$data/val/3/00000.png
"$python" -m litvit.demo_data "$data" --train-per-class 1700

train_and_validate() { # NAME: of the recipe and of the run; further flags of train.py
    run=$root/output/$1
    rm -rf "$run" # the last demo's
    "$python" train.py "$data" --config "$1" --output "$root/output" --experiment "$1" "${@:2}"
    "$python" validate.py "$data" --checkpoint "$run/model_best.safetensors" --results-file "$run/validation.json"
    echo "run:      $run (settings.yaml, summary.csv, train.log, tensorboard/, model_best.safetensors, validation.json)"
    echo "report:   $run/report.html (open it in a browser)"
}

if [[ ${1:-} == lvt ]]; then
    teacher=$root/output/demo/model_best.safetensors
    labels=$root/output/demo_labels
    [[ -f $teacher ]] || train_and_validate demo
    rm -rf "$labels"
    "$python" make_token_labels.py "$data" "$labels" --checkpoint "$teacher"
    train_and_validate demo_lvt --token-label-data "$labels"
    echo "labels:   $labels (what the LIT of 'make demo' sees at every token)"
else
    train_and_validate demo
    "$python" visualize_offset.py --resume "$run/model_best.safetensors" --vis_image "$image" --output "$run/offsets"
    echo "offsets:  $run/offsets/00000/overview.png"
    "$python" explore.py "$data"/val/{2,3,7,8}/00000.png --checkpoint "$run" --output "$run/explorer.html"
fi
echo "data:     $data"
[[ ${1:-} == lvt ]] || echo "explorer: $run/explorer.html (open it in a browser)"
"$python" -c 'import json, sys; print("demo: top1 %.1f" % json.load(open(sys.argv[1]))["top1"])' "$run/validation.json"
