# Panoptic FPN with LVT on COCO, 1x: no published number; 5.35 M parameters.
# Run:  bash tools/dist_train.sh configs/lvt/panoptic_fpn_lvt_fpn_1x_coco.py 8
# Cost: not measured.
_base_ = "_panoptic_fpn_lvt.py"
