# Data (`python -m litvit.demo_data ../data/ade-demo --task segmentation`) and schedule of the demos.
_base_ = ["mmseg::_base_/schedules/schedule_80k.py", "mmseg::_base_/default_runtime.py"]

data_root = "../data/ade-demo/"
metainfo = dict(
    classes=("gradient", "stripes", "noise", "discs", *"0123456789"),
    palette=[
        (255, 51, 51),
        (246, 133, 49),
        (237, 210, 47),
        (176, 228, 46),
        (94, 219, 44),
        (42, 209, 66),
        (40, 200, 132),
        (38, 191, 191),
        (36, 120, 182),
        (35, 54, 173),
        (70, 33, 164),
        (119, 31, 155),
        (146, 29, 129),
        (137, 27, 74),
    ],
)
crop_size = (128, 128)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.8),  # most crops show a digit
    dict(type="PackSegInputs"),  # no flip: a mirrored digit is no digit
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeToMultiple", size_divisor=32),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

iterations = 1500
train_cfg = dict(max_iters=iterations, val_interval=iterations // 3)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type="CosineAnnealingLR", T_max=iterations, eta_min_ratio=0.01, begin=0, end=iterations, by_epoch=False),
]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100, max_keep_ckpts=2))
randomness = dict(seed=0)
