# Mask R-CNN with LITv2-M on COCO, 1x: box AP 46.5, mask AP 42.0 (published, val2017), 68.3 M parameters.
# HiLo's windows are 4 x 4 tokens in stage 3, not 2 x 2.
# Run:  bash tools/dist_train.sh configs/litv2/mask_rcnn_litv2_m_fpn_1x_coco_ws_4.py 8
# Test: bash tools/dist_test.sh configs/litv2/mask_rcnn_litv2_m_fpn_1x_coco_ws_4.py \
#       https://github.com/ziplab/LITv2/releases/download/v1.0/mask_rcnn_litv2_m_fpn_1x_coco_ws_4.pth 8
# Cost: not measured.
_base_ = "mask_rcnn_litv2_m_fpn_1x_coco.py"

model = dict(backbone=dict(window_sizes=(0, 0, 4, 1)))
