# Mask R-CNN with a small LIT-Ti on the demo scenes (`python -m litvit.demo_data ../data/coco-demo --task detection`).
# Run:    make demo-detection, or in detection/: python tools/train.py configs/lit/mask_rcnn_lit_ti_fpn_demo.py
# Cost:   7 minutes of processor time for training (AMD EPYC, float32, measured), after `make demo`.
# Number: box AP50 92.1, mask AP50 91.1 on 200 held-out scenes (measured).
_base_ = "mask_rcnn_lit_ti_fpn_1x_coco.py"

data_root = "../data/coco-demo/"
metainfo = dict(classes=tuple("0123456789"))
scale = (192, 144)
channels = 64

model = dict(
    backbone=dict(
        img_size=(160, 192),
        dims=(32, 64, 160, 256),
        depths=(2, 2, 4, 2),
        mlp_ratios=(4, 4, 4, 4),
        drop_path_rate=0.0,
        init_cfg=dict(checkpoint="../output/demo/model_best.safetensors"),
    ),
    neck=dict(in_channels=[32, 64, 160, 256], out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=10),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="PackDetInputs"),  # no flip: a mirrored digit is no digit
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

epochs = 4
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=epochs, eta_min_ratio=0.01, begin=0, end=epochs, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
