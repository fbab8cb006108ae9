# Semantic FPN with LIT-Ti on ADE20K, 80K iterations: mIoU 41.3 (published, val), 23.6 M parameters.
# AdamW, the learning rate falls as (1 - i/80000)^0.9 to 1e-6; total batch 8 GPUs x 2.
# Run:  bash tools/dist_train.sh configs/lit/lit_ti_fpn_r50_512x512_80k_ade20k.py 8
# Test: bash tools/dist_test.sh configs/lit/lit_ti_fpn_r50_512x512_80k_ade20k.py \
#       https://github.com/ziplab/LIT/releases/download/v2.0/sem_fpn_lit_ti.pth 8
# Cost: not measured.
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "../_ade20k.py",
    "mmseg::_base_/schedules/schedule_80k.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["litvit.openmmlab"])

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="LIT",
        arch="lit_ti",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/lit_ti.pth"),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
    decode_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=1e-6, power=0.9, begin=0, end=80000, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
