# Semantic FPN with LITv2-B on ADE20K, 80K iterations: mIoU 47.2 (published, val), 90.0 M parameters.
# Run:  bash tools/dist_train.sh configs/litv2/litv2_b_fpn_r50_512x512_80k_ade20k.py 8
# Test: bash tools/dist_test.sh configs/litv2/litv2_b_fpn_r50_512x512_80k_ade20k.py \
#       https://github.com/ziplab/LITv2/releases/download/v1.0/litv2_b_fpn_r50_512x512_80k_ade20k.pth 8
# Cost: not measured.
_base_ = "litv2_s_fpn_r50_512x512_80k_ade20k.py"

model = dict(
    backbone=dict(arch="litv2_b", drop_path_rate=0.3, init_cfg=dict(checkpoint="pretrained/litv2_b.pth")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
