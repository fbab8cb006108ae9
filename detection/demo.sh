#!/usr/bin/env bash
# The demos on drawn scenes, end to end: train on a LIT of the classification demo, measure, draw.
#   demo.sh                 Mask R-CNN: box and mask AP    (make demo-detection)
#   demo.sh segmentation    Semantic FPN: mIoU             (make demo-segmentation)
# The classification demo runs first if it has not yet.
set -euo pipefail

task=${1:-detection}
python=${PYTHON:-$(cd "${LIT_VENV:-$(dirname "$0")/../.venv}/bin" && pwd)/python}
cd "$(dirname "$0")/.."
root=$PWD
run=$root/output/demo-$task
case $task in
    detection)
        data=$root/data/coco-demo images='val2017/00000000000[1-8].jpg'
        config=configs/lit/mask_rcnn_lit_ti_fpn_demo.py ;;
    segmentation)
        data=$root/data/ade-demo images='images/validation/ADE_val_0000000[1-8].jpg'
        config=configs/lit/lit_ti_fpn_demo.py ;;
    *) echo "error: '$task' is no demo: detection or segmentation" >&2; exit 2 ;;
esac

[[ -e $root/output/demo/model_best.safetensors ]] || PYTHON=$python bash "$root/classification/demo.sh"
cd "$task"
rm -rf "$run" # of the last demo
"$python" -m litvit.demo_data "$data" --task "$task"
"$python" tools/train.py "$config" --work-dir "$run"
checkpoint=$(<"$run/last_checkpoint")
"$python" tools/test.py "$config" "$checkpoint" --work-dir "$run/test"
# shellcheck disable=SC2086 # a pattern
"$python" tools/predict.py "$data"/$images --config "$config" --checkpoint "$checkpoint" --out "$run/pictures"

echo "data:     $data"
echo "run:      $run"
echo "pictures: $run/pictures"
"$python" - "$run/test" <<'PYTHON'
import json, pathlib, sys

numbers = json.loads(sorted(pathlib.Path(sys.argv[1]).glob("*/*.json"))[-1].read_text())
if "mIoU" in numbers:
    print(f"demo: mIoU {numbers['mIoU']:.1f}")
else:
    print("demo: box AP50 %.1f, mask AP50 %.1f" % tuple(100 * numbers[f"coco/{kind}_mAP_50"] for kind in ("bbox", "segm")))
PYTHON
