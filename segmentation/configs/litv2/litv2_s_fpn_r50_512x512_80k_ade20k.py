# Semantic FPN with LITv2-S on ADE20K, 80K iterations: mIoU 44.3 (published, val), 31.4 M parameters.
# Run:  bash tools/dist_train.sh configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py 8
# Test: bash tools/dist_test.sh configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py \
#       https://github.com/ziplab/LITv2/releases/download/v1.0/litv2_s_fpn_r50_512x512_80k_ade20k.pth 8
# Cost: not measured.
_base_ = "../lit/lit_ti_fpn_r50_512x512_80k_ade20k.py"

model = dict(
    backbone=dict(
        arch="litv2_s",
        window_sizes=(0, 0, 2, 1),
        out_norms=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="pretrained/litv2_s.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
