# Semantic FPN with LIT-Ti on data of one's own: a folder with images and their masks.
# Run:  python tools/train.py configs/finetune/fpn_lit_ti.py --cfg-options data_root=FOLDER
# Pairs, classes, their weights in the loss and the schedule are found (docs/finetuning.md).
# Cost: not measured. fpn_lit_small.py is for a CPU.
_base_ = "../lit/lit_ti_fpn_r50_512x512_80k_ade20k.py"

data_root = None
own_data = dict(
    classes=None,  # names, of classes.txt in data_root or the labels' numbers if None
    weights=None,  # file or link of a classifier or segmentor; None for ImageNet's, "" for random weights
    iterations=None,  # chosen by the number of images if None
)
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
