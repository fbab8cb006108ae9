# Mask R-CNN with LITv2-M on COCO, 1x: box AP 46.8, mask AP 42.3 (published, val2017), 68.3 M parameters.
# Run:  bash tools/dist_train.sh configs/litv2/mask_rcnn_litv2_m_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/litv2/mask_rcnn_litv2_m_fpn_1x_coco.py \
#       https://github.com/ziplab/LITv2/releases/download/v1.0/mask_rcnn_litv2_m_fpn_1x_coco.pth 8
# Cost: not measured.
_base_ = "mask_rcnn_litv2_s_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="litv2_m", init_cfg=dict(checkpoint="pretrained/litv2_m.pth")),
)
