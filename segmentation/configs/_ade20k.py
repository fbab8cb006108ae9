# Data of the ADE20K configs: mmseg's, with two changes. Only the data set, not the pipeline, sets what label 0 means.
# The sizes of test-time augmentation are relative to the test size (shorter side 512) and not to the image's own size,
# as in mmseg 0.x.
_base_ = "mmseg::_base_/datasets/ade20k.py"

train_pipeline, test_pipeline, tta_pipeline = _base_.train_pipeline, _base_.test_pipeline, _base_.tta_pipeline
train_pipeline[1].pop("reduce_zero_label")
test_pipeline[2].pop("reduce_zero_label")
tta_pipeline[1].transforms[0] = [
    dict(type="Resize", scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True) for ratio in _base_.img_ratios
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
