# Semantic FPN with a small LIT-Ti on the demo scenes
# (`python -m litvit.demo_data ../data/ade-demo --task segmentation`).
# Run:    make demo-segmentation, or in segmentation/: python tools/train.py configs/lit/lit_ti_fpn_demo.py
# Cost:   10 minutes on 2 cores of an AMD EPYC, 9 of them training, after `make demo` (measured).
# Number: mIoU 62.4 on 200 held-out scenes (measured).
_base_ = ["mmseg::_base_/models/fpn_r50.py", "../_demo.py"]
custom_imports = dict(imports=["litvit.openmmlab"])

crop_size = (128, 128)
channels = 64

model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="LIT",
        img_size=crop_size,
        dims=(32, 64, 160, 256),
        depths=(2, 2, 4, 2),
        mlp_ratios=(4, 4, 4, 4),
        init_cfg=dict(type="Pretrained", checkpoint="../output/demo/model_best.safetensors"),
    ),
    neck=dict(in_channels=[32, 64, 160, 256], out_channels=channels),
    # Digits are ten of the classes and a tenth of the pixels.
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        num_classes=14,
        loss_decode=dict(class_weight=[1.0] * 4 + [8.0] * 10),
    ),
)
# The backbone is trained on digits already; the neck and the head start from scratch.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.05))))
