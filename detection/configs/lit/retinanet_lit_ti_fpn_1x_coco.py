# RetinaNet with LIT-Ti on COCO, 1x: box AP 41.6 (published, val2017), 29.6 M parameters.
# Run:  bash tools/dist_train.sh configs/lit/retinanet_lit_ti_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/lit/retinanet_lit_ti_fpn_1x_coco.py \
#       https://github.com/ziplab/LIT/releases/download/v2.0/retina_lit_ti.pth 8
# Cost: not measured.
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "mmdet::_base_/datasets/coco_detection.py", "_lit_1x.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="LIT",
        arch="lit_ti",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/lit_ti.pth"),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
