# Mask R-CNN with the demos' small LIT on data of one's own, images at 256 x 192: for a CPU, and to try one's files.
# Run:  python tools/train.py configs/finetune/mask_rcnn_lit_small.py --cfg-options data_root=FOLDER
# Needs `make demo`, whose weights it starts from, or own_data.weights=FILE ("": random weights).
_base_ = "../lit/mask_rcnn_lit_ti_fpn_demo.py"

own_data = dict(classes=None, train=None, val=None, weights=None, iterations=None)  # see mask_rcnn_lit_ti.py

scale = (256, 192)
model = dict(backbone=dict(img_size=(192, 256)))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
