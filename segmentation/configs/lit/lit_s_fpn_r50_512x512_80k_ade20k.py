# Semantic FPN with LIT-S on ADE20K, 80K iterations: mIoU 41.7 (published, val), 31.9 M parameters.
# Run:  bash tools/dist_train.sh configs/lit/lit_s_fpn_r50_512x512_80k_ade20k.py 8
# Test: bash tools/dist_test.sh configs/lit/lit_s_fpn_r50_512x512_80k_ade20k.py \
#       https://github.com/ziplab/LIT/releases/download/v2.0/sem_fpn_lit_s.pth 8
# Cost: not measured.
_base_ = "lit_ti_fpn_r50_512x512_80k_ade20k.py"

model = dict(
    backbone=dict(
        arch="lit_s",
        img_size=512,
        out_norms=(0, 1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="pretrained/lit_s.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
