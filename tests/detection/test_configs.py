"""The configs build the published detectors."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
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
        ("litv2/retinanet_litv2_s_fpn_1x_coco.py", 38.01, 1e-4, 2),
        ("litv2/retinanet_litv2_m_fpn_1x_coco.py", 59.00, 1e-4, 2),
        ("litv2/retinanet_litv2_b_fpn_1x_coco.py", 97.14, 1e-4, 2),
        ("litv2/retinanet_litv2_s_fpn_1x_coco_ws_4.py", 38.01, 1e-4, 2),
        ("litv2/retinanet_litv2_m_fpn_1x_coco_ws_4.py", 59.00, 1e-4, 2),
        ("litv2/retinanet_litv2_b_fpn_1x_coco_ws_4.py", 97.14, 1e-4, 2),
        ("litv2/mask_rcnn_litv2_s_fpn_1x_coco.py", 47.35, 2e-4, 2),
        ("litv2/mask_rcnn_litv2_m_fpn_1x_coco.py", 68.34, 2e-4, 2),
        ("litv2/mask_rcnn_litv2_b_fpn_1x_coco.py", 105.89, 2e-4, 2),
        ("litv2/mask_rcnn_litv2_s_fpn_1x_coco_ws_4.py", 47.35, 2e-4, 2),
        ("litv2/mask_rcnn_litv2_m_fpn_1x_coco_ws_4.py", 68.34, 2e-4, 2),
        ("litv2/mask_rcnn_litv2_b_fpn_1x_coco_ws_4.py", 105.89, 2e-4, 2),
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
    hilo = "litv2" in file
    relative = not hilo and "lit_ti" not in file and "lvt" not in file
    assert (config.optim_wrapper.type == "AmpOptimWrapper") == (relative or hilo)
    assert config.model.backbone.get("with_cp", False) == relative
    assert ("relative_position_bias_table" in str(config.optim_wrapper.get("paramwise_cfg"))) == relative
    if hilo:
        backbone = config.model.backbone
        assert backbone.arch == backbone.init_cfg.checkpoint.removeprefix("pretrained/").removesuffix(".pth")
        assert backbone.arch in file
        assert backbone.drop_path_rate == (0.3 if "litv2_b" in file else 0.2)
        windows = [stage.blocks[0].attn.window_size for stage in detector.backbone.stages[2:]]
        assert windows == [4 if "ws_4" in file else 2, 1]
        assert list(detector.backbone.out_norms) == ["1", "2", "3"]


def test_a_small_litv2_takes_a_step():
    """On images that neither 32 nor a window of 4 tokens divides; norms have no weight decay."""
    config = Config.fromfile(CONFIGS / "litv2/retinanet_litv2_s_fpn_1x_coco_ws_4.py")
    config.model.backbone |= {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 2)}
    config.model.backbone.init_cfg = None
    config.model.neck.in_channels = [16, 16, 32, 32]
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(config.model).train()
        wrapper = build_optim_wrapper(detector, config.optim_wrapper | {"type": "OptimWrapper"})
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    *groups, _ = wrapper.param_groups  # the last one is mmengine's, for its log
    for group in groups:
        name = names[id(group["params"][0])]
        assert group["weight_decay"] == (0 if "norm" in name else 1e-4), name
    before = {name: parameter.detach().clone() for name, parameter in detector.named_parameters()}
    torch.manual_seed(0)
    images = [(3, 97, 131), (3, 150, 75)]
    losses = detector.train_step(demo_mm_inputs(2, images, num_classes=80), wrapper)
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    still = [name for name, parameter in detector.named_parameters() if torch.equal(parameter, before[name])]
    assert not [name for name in still if name.startswith("backbone.")]


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
