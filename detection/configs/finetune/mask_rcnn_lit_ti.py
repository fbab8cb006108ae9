# Mask R-CNN with LIT-Ti on data of one's own: a folder with images and COCO annotation files for train and val.
# Run:  python tools/train.py configs/finetune/mask_rcnn_lit_ti.py --cfg-options data_root=FOLDER
# Files, classes, masks and the schedule are found (docs/finetuning.md); a file without masks trains boxes alone.
# Cost: not measured. mask_rcnn_lit_small.py is for a CPU.
_base_ = "../lit/mask_rcnn_lit_ti_fpn_1x_coco.py"

own_data = dict(
    classes=None,  # names, all of the files' if None
    train=None,  # annotation files in data_root, found by their names if None
    val=None,
    weights=None,  # file or link of a classifier or detector; None for ImageNet's, "" for random weights
    iterations=None,  # chosen by the number of images if None
)
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
