# SegFormer with a small LVT on the demo scenes (`python -m litvit.demo_data ../data/ade-demo --task segmentation`).
# Run:    after make demo-lvt, in segmentation/: python tools/train.py configs/lvt/segformer_lvt_demo.py
# Number: mIoU 21.8, 29.3, 31.8 after 500, 1000 and 1500 iterations (measured).
_base_ = ["mmseg::_base_/models/segformer_mit-b0.py", "../_demo.py"]
custom_imports = dict(imports=["litvit.openmmlab", "litvit.openmmlab.segmentation"])

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        _delete_=True,
        type="LVT",
        dims=(32, 32, 96, 160),
        num_heads=(1, 1, 3, 5),
        mlp_ratios=(4, 4, 4, 4),
        init_cfg=dict(type="Pretrained", checkpoint="../output/demo_lvt/model_best.safetensors"),
    ),
    decode_head=dict(
        type="SegFormerHead",
        in_channels=[32, 32, 96, 160],
        num_classes=14,
        loss_decode=dict(class_weight=[1.0] * 4 + [8.0] * 10),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
