# Mask R-CNN with LITv2-S on COCO, 1x: box AP 44.9, mask AP 40.8 (published, val2017), 47.4 M parameters.
# Run:  bash tools/dist_train.sh configs/litv2/mask_rcnn_litv2_s_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/litv2/mask_rcnn_litv2_s_fpn_1x_coco.py \
#       https://github.com/ziplab/LITv2/releases/download/v1.0/mask_rcnn_litv2_s_fpn_1x_coco.pth 8
# Cost: not measured. Half precision, as LIT-S is published with. Activation checkpointing, which LIT-S needs for its
#       attention bias, is off: fused attention keeps no attention weights. Written out, those of a block of stage 3 at
#       1333 x 800 would be 176 MB per image in float32.
# Float32: --cfg-options optim_wrapper.type=OptimWrapper. Less memory: --cfg-options model.backbone.with_cp=True
_base_ = "../lit/mask_rcnn_lit_ti_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        arch="litv2_s",
        window_sizes=(0, 0, 2, 1),
        out_norms=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="pretrained/litv2_s.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
