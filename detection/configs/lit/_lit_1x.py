# Schedule of LIT on COCO, as published. 1x: 12 epochs, AdamW, linear warm-up over 500 iterations from
# 0.001 of the learning rate, x0.1 at epochs 8 and 11; total batch 8 GPUs x 2 (with fewer GPUs: --auto-scale-lr).
# Half precision: --amp. Activation checkpointing: --cfg-options model.backbone.with_cp=True.
_base_ = ["mmdet::_base_/schedules/schedule_1x.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["litvit.openmmlab", "litvit.openmmlab.coco"])

optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
