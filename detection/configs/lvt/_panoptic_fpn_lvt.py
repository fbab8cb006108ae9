# Model, data and schedule of LVT on COCO, as published: AdamW, linear warm-up over 500 iterations from 0.001 of the
# learning rate, x0.1 at epochs 8 and 11 of 12; total batch 8 GPUs x 8 (with fewer GPUs: --auto-scale-lr).
# Half precision: --amp. Activation checkpointing: --cfg-options model.backbone.with_cp=True.
_base_ = "mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["litvit.openmmlab", "litvit.openmmlab.panoptic"])

model = dict(
    backbone=dict(_delete_=True, type="LVT", init_cfg=dict(type="Pretrained", checkpoint="pretrained/lvt.pth")),
    neck=dict(in_channels=[64, 64, 160, 256], out_channels=96),
    rpn_head=dict(in_channels=96, feat_channels=96),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=96),
        bbox_head=dict(in_channels=96, fc_out_channels=160),
        mask_roi_extractor=dict(out_channels=96),
        mask_head=dict(in_channels=96, conv_out_channels=96),
    ),
    semantic_head=dict(in_channels=96, inner_channels=48, norm_cfg=dict(num_groups=12)),
)

# mmdet's own classes for panoptic files need panopticapi, which is on no package index.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadCocoPanoptic"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="LoadCocoPanoptic"),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type="PanopticQualityMetric",
    ann_file="data/coco/annotations/panoptic_val2017.json",
    seg_prefix="data/coco/annotations/panoptic_val2017/",
)
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=4e-4, weight_decay=1e-4))
auto_scale_lr = dict(base_batch_size=64)
