# SegFormer with LVT on the demo scenes (`python -m litvit.demo_data data/ade-demo --task segmentation`), from scratch.
# Run:  in segmentation/: python tools/train.py configs/lvt/segformer_lvt_demo.py
# Cost: not measured.
_base_ = ["mmseg::_base_/models/segformer_mit-b0.py", "../_demo.py"]
custom_imports = dict(imports=["litvit.openmmlab", "litvit.openmmlab.segmentation"])

model = dict(
    data_preprocessor=dict(size=(160, 192)),
    backbone=dict(_delete_=True, type="LVT"),
    decode_head=dict(type="SegFormerHead", in_channels=[64, 64, 160, 256], num_classes=14),
)
