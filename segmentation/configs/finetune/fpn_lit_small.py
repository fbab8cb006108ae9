# Semantic FPN with the demos' small LIT on data of one's own, crops of 128 x 128: for a CPU, and to try one's files.
# Run:  python tools/train.py configs/finetune/fpn_lit_small.py --cfg-options data_root=FOLDER
# Needs `make demo`, whose weights it starts from, or own_data.weights=FILE ("": random weights).
_base_ = "../lit/lit_ti_fpn_demo.py"

data_root = None
own_data = dict(classes=None, weights=None, iterations=None)  # see fpn_lit_ti.py

scale = (512, 128)  # the shorter side becomes 128
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=scale, ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(128, 128), cat_max_ratio=0.9),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
# One's own images differ more from digits than the demo's scenes, so the backbone learns faster than there.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.5))))
