# Semantic FPN with LIT-B on ADE20K, 80K iterations: no published number; 91.7 M parameters.
# LIT-S's settings; stochastic depth as Swin-B's.
# Run:  bash tools/dist_train.sh configs/lit/lit_b_fpn_r50_512x512_80k_ade20k.py 8
# Test: bash tools/dist_test.sh configs/lit/lit_b_fpn_r50_512x512_80k_ade20k.py \
#       work_dirs/lit_b_fpn_r50_512x512_80k_ade20k/iter_80000.pth 8    (no checkpoint is published)
# Cost: not measured.
_base_ = "lit_s_fpn_r50_512x512_80k_ade20k.py"

model = dict(
    backbone=dict(arch="lit_b", drop_path_rate=0.3, init_cfg=dict(checkpoint="pretrained/lit_b.pth")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
