# Mask R-CNN with LIT-M on COCO, 1x: no published number; 71.0 M parameters.
# LIT-S's settings; stochastic depth as Swin-S's.
# Run:  bash tools/dist_train.sh configs/lit/mask_rcnn_lit_m_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/lit/mask_rcnn_lit_m_fpn_1x_coco.py \
#       work_dirs/mask_rcnn_lit_m_fpn_1x_coco/epoch_12.pth 8    (no checkpoint is published)
# Cost: not measured.
_base_ = "mask_rcnn_lit_s_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="lit_m", drop_path_rate=0.2, init_cfg=dict(checkpoint="pretrained/lit_m.pth")),
)
