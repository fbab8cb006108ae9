# SegFormer with LVT on ADE20K, 160K iterations: mIoU 39.3 (published, val), 3.87 M parameters.
# AdamW, linear warm-up over 1500 iterations from 1e-6 of the learning rate, which falls linearly to 0; total batch
# 8 GPUs x 2. The head is SegFormer's own, whose learning rate is ten times the backbone's.
# Run:  bash tools/dist_train.sh configs/lvt/segformer.lvt.512x512.ade.160k.py 8
# Test: bash tools/dist_test.sh configs/lvt/segformer.lvt.512x512.ade.160k.py FILE 8
#       FILE: the page of https://github.com/Chenglin-Yang/LVT leads to it, no program can fetch it
# Cost: not measured.
_base_ = [
    "mmseg::_base_/models/segformer_mit-b0.py",
    "../_ade20k.py",
    "mmseg::_base_/schedules/schedule_160k.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["litvit.openmmlab", "litvit.openmmlab.segmentation"])

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="LVT",
        drop_path_rate=0.0,
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/lvt.pth"),
    ),
    decode_head=dict(type="SegFormerHead", in_channels=[64, 64, 160, 256], num_classes=150),
)

test_pipeline, tta_pipeline = _base_.test_pipeline, _base_.tta_pipeline
test_pipeline.insert(2, dict(type="ResizeToMultiple", size_divisor=32))
tta_pipeline[1].transforms.insert(1, [dict(type="ResizeToMultiple", size_divisor=32)])
train_dataloader = dict(batch_size=2)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0), "head": dict(lr_mult=10.0)}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=0, end=160000, by_epoch=False),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
