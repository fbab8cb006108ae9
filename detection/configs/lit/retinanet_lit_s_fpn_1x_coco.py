# RetinaNet with LIT-S on COCO, 1x: box AP 41.6 (published, val2017), 38.9 M parameters.
# Run:  bash tools/dist_train.sh configs/lit/retinanet_lit_s_fpn_1x_coco.py 8
# Test: bash tools/dist_test.sh configs/lit/retinanet_lit_s_fpn_1x_coco.py \
#       https://github.com/ziplab/LIT/releases/download/v2.0/retina_lit_s.pth 8
# Cost: not measured. Half precision and activation checkpointing as published: at 1333 x 800 the attention bias of one
#       block of stage 3 is 847 MB in float32.
# Without them: --cfg-options optim_wrapper.type=OptimWrapper model.backbone.with_cp=False
_base_ = "retinanet_lit_ti_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        arch="lit_s",
        img_size=800,
        out_norms=(1, 2, 3),
        drop_path_rate=0.2,
        with_cp=True,
        init_cfg=dict(checkpoint="pretrained/lit_s.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(
        custom_keys={"norm": dict(decay_mult=0.0), "relative_position_bias_table": dict(decay_mult=0.0)}
    ),
)
