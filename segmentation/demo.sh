#!/usr/bin/env bash
# The demo, end to end: drawn scenes -> Semantic FPN on a demo-trained LIT -> mIoU, pictures.
# `make demo-segmentation` calls it. The backbone is the classification demo's; where that has not run, it runs first.
set -euo pipefail

python=${PYTHON:-$(cd "${LIT_VENV:-$(dirname "$0")/../.venv}/bin" && pwd)/python}
cd "$(dirname "$0")"
root=$(cd .. && pwd)
data=$root/data/ade-demo
run=$root/output/demo-segmentation
config=configs/lit/lit_ti_fpn_demo.py

[[ -e $root/output/demo/model_best.safetensors ]] || PYTHON=$python bash "$root/classification/demo.sh"
rm -rf "$run" # the last demo's
"$python" -m litvit.demo_data "$data" --task segmentation
"$python" tools/train.py "$config" --work-dir "$run"
"$python" tools/test.py "$config" "$(<"$run/last_checkpoint")" --work-dir "$run/test"
"$python" tools/predict.py "$data"/images/validation/ADE_val_0000000[1-8].jpg --config "$config" \
    --checkpoint "$(<"$run/last_checkpoint")" --out "$run/pictures"

echo "data:     $data"
echo "run:      $run"
echo "pictures: $run/pictures"
"$python" - "$run/test" <<'PYTHON'
import json, pathlib, sys

numbers = json.loads(sorted(pathlib.Path(sys.argv[1]).glob("*/*.json"))[-1].read_text())
print(f"demo: mIoU {numbers['mIoU']:.1f}")
PYTHON
