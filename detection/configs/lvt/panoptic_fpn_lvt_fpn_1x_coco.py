# Panoptic FPN with LVT on COCO, 1x: no published number; 5.35 M parameters.
# Run:  bash tools/dist_train.sh configs/lvt/panoptic_fpn_lvt_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/lvt/panoptic_fpn_lvt_fpn_1x_coco.py \
#       work_dirs/panoptic_fpn_lvt_fpn_1x_coco/epoch_12.pth 8    (no checkpoint is published)
# Cost: not measured.
_base_ = "_panoptic_fpn_lvt.py"
