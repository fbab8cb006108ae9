# Mask R-CNN with LITv2-B on COCO, 1x: box AP 47.3, mask AP 42.6 (published, val2017), 105.9 M parameters.
# Run:  bash tools/dist_train.sh configs/litv2/mask_rcnn_litv2_b_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/litv2/mask_rcnn_litv2_b_fpn_1x_coco.py \
#       https://github.com/ziplab/LITv2/releases/download/v1.0/mask_rcnn_litv2_b_fpn_1x_coco.pth 8
# Cost: not measured.
_base_ = "mask_rcnn_litv2_s_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="litv2_b", drop_path_rate=0.3, init_cfg=dict(checkpoint="pretrained/litv2_b.pth")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
