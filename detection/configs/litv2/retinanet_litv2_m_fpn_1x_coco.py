# RetinaNet with LITv2-M on COCO, 1x: box AP 46.0 (published, val2017), 59.0 M parameters.
# Run:  bash tools/dist_train.sh configs/litv2/retinanet_litv2_m_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/litv2/retinanet_litv2_m_fpn_1x_coco.py \
#       https://github.com/ziplab/LITv2/releases/download/v1.0/retinanet_litv2_m_fpn_1x_coco.pth 8
# Cost: not measured.
_base_ = "retinanet_litv2_s_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="litv2_m", init_cfg=dict(checkpoint="pretrained/litv2_m.pth")),
)
