#!/usr/bin/env bash
# The demo, end to end: real digits -> a trained LIT -> its top-1 and its offset plots. `make demo` calls it.
set -euo pipefail

python=${PYTHON:-$(cd "${LIT_VENV:-$(dirname "$0")/../.venv}/bin" && pwd)/python}
cd "$(dirname "$0")"
root=$(cd .. && pwd)
data=$root/data/demo
run=$root/output/demo
image=$data/val/3/00000.png

rm -rf "$run" # the last demo's
"$python" -m litvit.demo_data "$data" --train-per-class 1700
"$python" train.py "$data" --config recipes/demo.yaml --output "$root/output" --experiment demo
"$python" validate.py "$data" --checkpoint "$run/model_best.safetensors" --results-file "$run/validation.json"
"$python" visualize_offset.py --resume "$run/model_best.safetensors" --vis_image "$image" --output "$run/offsets"

echo "data:     $data"
echo "run:      $run (settings.yaml, summary.csv, train.log, tensorboard/, model_best.safetensors, validation.json)"
echo "offsets:  $run/offsets/00000/overview.png"
"$python" -c 'import json, sys; print("demo: top1 %.1f" % json.load(open(sys.argv[1]))["top1"])' "$run/validation.json"
