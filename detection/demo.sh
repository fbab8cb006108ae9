#!/usr/bin/env bash
# The demo, end to end: drawn scenes -> Mask R-CNN on a demo-trained LIT -> box and mask AP, pictures.
# `make demo-detection` calls it. The backbone is the classification demo's; where that has not run, it runs first.
set -euo pipefail

python=${PYTHON:-$(cd "${LIT_VENV:-$(dirname "$0")/../.venv}/bin" && pwd)/python}
cd "$(dirname "$0")"
root=$(cd .. && pwd)
data=$root/data/coco-demo
run=$root/output/demo-detection
config=configs/lit/mask_rcnn_lit_ti_fpn_demo.py

[[ -e $root/output/demo/model_best.safetensors ]] || PYTHON=$python bash "$root/classification/demo.sh"
rm -rf "$run" # the last demo's
"$python" -m litvit.demo_data "$data" --task detection
"$python" tools/train.py "$config" --work-dir "$run"
"$python" tools/test.py "$config" "$(<"$run/last_checkpoint")" --work-dir "$run/test"
"$python" tools/predict.py "$data"/val2017/00000000000[1-8].jpg --config "$config" \
    --checkpoint "$(<"$run/last_checkpoint")" --out "$run/pictures"

echo "data:     $data"
echo "run:      $run"
echo "pictures: $run/pictures"
"$python" - "$run/test" <<'PYTHON'
import json, pathlib, sys

numbers = json.loads(sorted(pathlib.Path(sys.argv[1]).glob("*/*.json"))[-1].read_text())
print("demo: box AP50 %.1f, mask AP50 %.1f" % tuple(100 * numbers[f"coco/{kind}_mAP_50"] for kind in ("bbox", "segm")))
PYTHON
