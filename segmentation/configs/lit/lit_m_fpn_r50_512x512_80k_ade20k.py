# Semantic FPN with LIT-M on ADE20K, 80K iterations: no published number; 53.7 M parameters.
# LIT-S's settings; stochastic depth as Swin-S's.
# Run:  bash tools/dist_train.sh configs/lit/lit_m_fpn_r50_512x512_80k_ade20k.py 8
# Test: bash tools/dist_test.sh configs/lit/lit_m_fpn_r50_512x512_80k_ade20k.py \
#       work_dirs/lit_m_fpn_r50_512x512_80k_ade20k/iter_80000.pth 8    (no checkpoint is published)
# Cost: not measured.
_base_ = "lit_s_fpn_r50_512x512_80k_ade20k.py"

model = dict(
    backbone=dict(arch="lit_m", drop_path_rate=0.2, init_cfg=dict(checkpoint="pretrained/lit_m.pth")),
)
