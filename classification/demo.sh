#!/usr/bin/env bash
# The demo, end to end: real digits -> a trained LIT -> its top-1 and its offset plots. `make demo` calls it.
set -euo pipefail

python=${PYTHON:-$(cd "${LIT_VENV:-$(dirname "$0")/../.venv}/bin" && pwd)/python}
cd "$(dirname "$0")"
data=$PWD/../data/demo
output=$PWD/../output
run=$output/demo
model=$(sed -n 's/^model: *//p' recipes/demo.yaml)

"$python" -m litvit.demo_data "$data"
"$python" train.py "$data" --config recipes/demo.yaml --output "$output" --experiment demo
"$python" validate.py "$data" --model "$model" --checkpoint "$run/model_best.safetensors" \
    --results-file "$run/validation.json"
image=$(find "$data/val" -name '*.png' | sort | head -n 1)
"$python" visualize_offset.py --model "$model" --resume "$run/model_best.safetensors" --vis_image "$image"

echo "data:     $data"
echo "run:      $run (settings, summary.csv, weights, validation.json)"
echo "offsets:  $PWD/visualization/$(basename "$image" .png)"
"$python" -c 'import json, sys; print("demo: top1 %.1f" % json.load(open(sys.argv[1]))["top1"])' "$run/validation.json"
