"""The configs build the published detectors."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope

CONFIGS = Path(__file__).parents[2] / "detection" / "configs"


@pytest.mark.parametrize(
    ("file", "millions", "lr", "batch"),
    [
        ("lit/retinanet_lit_ti_fpn_1x_coco.py", 29.62, 1e-4, 2),
        ("lit/retinanet_lit_s_fpn_1x_coco.py", 38.90, 1e-4, 2),
        ("lit/retinanet_lit_m_fpn_1x_coco.py", 61.61, 1e-4, 2),
        ("lit/retinanet_lit_b_fpn_1x_coco.py", 100.67, 1e-4, 2),
        ("lit/mask_rcnn_lit_ti_fpn_1x_coco.py", 39.54, 2e-4, 2),
        ("lit/mask_rcnn_lit_s_fpn_1x_coco.py", 48.24, 2e-4, 2),
        ("lit/mask_rcnn_lit_m_fpn_1x_coco.py", 70.95, 2e-4, 2),
        ("lit/mask_rcnn_lit_b_fpn_1x_coco.py", 109.42, 2e-4, 2),
        ("lvt/panoptic_fpn_lvt_fpn_1x_coco.py", 5.35, 4e-4, 8),
        ("lvt/panoptic_fpn_lvt_fpn_3x_coco.py", 5.35, 3e-4, 8),
    ],
)
def test_parameters_and_published_settings(file, millions, lr, batch):
    config = Config.fromfile(CONFIGS / file)
    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        detector = MODELS.build(config.model)
    assert round(sum(parameter.numel() for parameter in detector.parameters()) / 1e6, 2) == millions
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", lr, 1e-4)
    assert config.train_dataloader.batch_size == batch
    assert config.auto_scale_lr.base_batch_size == 8 * batch
    assert config.train_cfg.max_epochs == 12
    warmup, steps = config.param_scheduler
    assert (warmup.start_factor, warmup.end, steps.milestones) == (0.001, 500, [8, 11])
    relative = "lit_ti" not in file and "lvt" not in file
    assert (config.optim_wrapper.type == "AmpOptimWrapper") == relative
    assert config.model.backbone.get("with_cp", False) == relative
    assert ("relative_position_bias_table" in str(config.optim_wrapper.get("paramwise_cfg"))) == relative


def test_panoptic_head_and_repeated_training_set():
    config = Config.fromfile(CONFIGS / "lvt/panoptic_fpn_lvt_fpn_3x_coco.py")
    assert config.train_dataloader.dataset.times == 3
    assert config.train_pipeline[2].scale == [(1333, 640), (1333, 800)]
    test = config.model.test_cfg
    assert (test.rcnn.score_thr, test.rcnn.nms.iou_threshold, test.rcnn.nms.class_agnostic) == (0.6, 0.5, True)
    assert (test.panoptic.mask_overlap, test.panoptic.stuff_area_limit) == (0.5, 4096)
    assert "panopticapi" not in config.pretty_text
    assert config.val_evaluator.type == "PanopticQualityMetric"


@pytest.mark.parametrize("file", ["lit/mask_rcnn_lit_ti_fpn_demo.py", "lvt/panoptic_fpn_lvt_fpn_demo.py"])
def test_demo_configs_predict(file):
    config = Config.fromfile(CONFIGS / file)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(config.model).eval()
    with torch.no_grad():
        maps = detector.extract_feat(torch.randn(1, 3, 192, 256))
    assert [tuple(x.shape[-2:]) for x in maps] == [(48, 64), (24, 32), (12, 16), (6, 8), (3, 4)]
