# Panoptic FPN with a small LVT on the demo's panoptic scenes: digits are things, backgrounds are stuff.
# Run:    make demo-lvt, then in detection/: python -m litvit.demo_data ../data/coco-demo --task detection
#         python tools/train.py configs/lvt/panoptic_fpn_lvt_fpn_demo.py
# Cost:   14 minutes on 2 cores of an AMD EPYC that were shared, float32.
# Number: PQ 45.4, of things 59.1, of stuff 11.0 on 200 held-out scenes (measured; each epoch 4.0, 21.6, 40.2, 45.4).
#         The scenes now have finer textures (`drawing` 2); not measured on them.
_base_ = "_panoptic_fpn_lvt.py"

data_root = "../data/coco-demo/"
things = tuple("0123456789")
stuff = ("gradient", "stripes", "noise", "discs")
metainfo = dict(classes=(*things, *stuff), thing_classes=things, stuff_classes=stuff)
scale = (192, 144)

model = dict(
    backbone=dict(
        dims=(32, 32, 96, 160),
        num_heads=(1, 1, 3, 5),
        mlp_ratios=(4, 4, 4, 4),
        class_heads=5,
        init_cfg=dict(checkpoint="../output/demo_lvt/model_best.safetensors"),
    ),
    neck=dict(in_channels=[32, 32, 96, 160]),
    roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_convs=2, num_classes=10)),
    semantic_head=dict(num_things_classes=10, num_stuff_classes=4),
    panoptic_fusion_head=dict(num_things_classes=10, num_stuff_classes=4),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), panoptic=dict(stuff_area_limit=256)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadCocoPanoptic"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="PackDetInputs"),  # no flip: a mirrored digit is no digit
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    ann_file=data_root + "annotations/panoptic_val2017.json", seg_prefix=data_root + "annotations/panoptic_val2017/"
)
test_evaluator = val_evaluator

epochs = 4
train_cfg = dict(max_epochs=epochs, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=epochs, eta_min_ratio=0.01, begin=0, end=epochs, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
