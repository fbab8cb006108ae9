# Mask R-CNN with LIT-Ti on COCO, 1x: box AP 42.0, mask AP 39.1 (published, val2017), 39.5 M parameters.
# Run:  bash tools/dist_train.sh configs/lit/mask_rcnn_lit_ti_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/lit/mask_rcnn_lit_ti_fpn_1x_coco.py \
#       https://github.com/ziplab/LIT/releases/download/v2.0/mask_rcnn_lit_ti.pth 8
# Cost: not measured.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/datasets/coco_instance.py", "_lit_1x.py"]

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
optim_wrapper = dict(optimizer=dict(lr=2e-4))
