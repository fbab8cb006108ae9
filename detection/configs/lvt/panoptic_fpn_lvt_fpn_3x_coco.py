# Panoptic FPN with LVT on COCO, 3x: PQ 42.8, of things 49.5, of stuff 32.6 (published, val2017); 5.35 M parameters,
# 56.4 G multiply-adds at 1333 x 800 (published).
# Run:  bash tools/dist_train.sh configs/lvt/panoptic_fpn_lvt_fpn_3x_coco.py 8
# Test: bash tools/dist_test.sh configs/lvt/panoptic_fpn_lvt_fpn_3x_coco.py FILE 8
#       FILE: the page of https://github.com/Chenglin-Yang/LVT leads to it, no program can fetch it
# Cost: not measured.
_base_ = "_panoptic_fpn_lvt.py"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadCocoPanoptic"),
    dict(type="RandomResize", scale=[(1333, 640), (1333, 800)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="RepeatDataset",
        times=3,
        dataset=dict(
            type="CocoPanopticDataset",
            data_root="data/coco/",
            ann_file="annotations/panoptic_train2017.json",
            data_prefix=dict(img="train2017/", seg="annotations/panoptic_train2017/"),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=train_pipeline,
        ),
    )
)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
