"""The configs build the published segmentors, which predict images of any size."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image

import litvit.openmmlab  # noqa: F401 (mmseg:: in configs)
from litvit.demo_data import PALETTE, SEGMENTATION_CLASSES

CONFIGS = Path(__file__).parents[2] / "segmentation" / "configs"
LIT = "lit/lit_{}_fpn_r50_512x512_80k_ade20k.py"
LITV2 = "litv2/litv2_{}_fpn_r50_512x512_80k_ade20k.py"
LVT = "lvt/segformer.lvt.512x512.ade.160k.py"


def build(config):
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(config.model)


@pytest.mark.parametrize(
    ("file", "millions"),
    [
        (LIT.format("ti"), 23.64),
        (LIT.format("s"), 31.85),
        (LIT.format("m"), 53.72),
        (LIT.format("b"), 91.75),
        (LITV2.format("s"), 31.45),
        (LITV2.format("m"), 52.44),
        (LITV2.format("b"), 89.99),
        (LVT, 3.87),
    ],
)
def test_parameters_and_published_settings(file, millions):
    config = Config.fromfile(CONFIGS / file)
    with torch.device("meta"):
        segmentor = build(config)
    assert round(sum(parameter.numel() for parameter in segmentor.parameters()) / 1e6, 2) == millions
    lit = file != LVT
    optimizer, decay = config.optim_wrapper.optimizer, config.param_scheduler[-1]
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == (
        ("AdamW", 1e-4, 1e-4) if lit else ("AdamW", 6e-5, 0.01)
    )
    assert (decay.type, decay.power, decay.eta_min) == (("PolyLR", 0.9, 1e-6) if lit else ("PolyLR", 1.0, 0.0))
    assert config.train_cfg.max_iters == decay.end == (80000 if lit else 160000)
    assert 8 * config.train_dataloader.batch_size == config.auto_scale_lr.base_batch_size == 16
    steps = {step.type: step for step in config.train_dataloader.dataset.pipeline}
    assert steps["RandomResize"].scale == (2048, 512)
    assert steps["RandomResize"].ratio_range == (0.5, 2.0)
    assert steps["RandomCrop"].crop_size == (512, 512)
    assert {"RandomFlip", "PhotoMetricDistortion"} <= steps.keys()
    for loader in (config.val_dataloader, config.test_dataloader):
        steps = {step.type: step for step in loader.dataset.pipeline}
        assert (steps["Resize"].scale, steps["Resize"].keep_ratio) == ((2048, 512), True)
        assert ("ResizeToMultiple" in steps) == (not lit)
    assert config.model.test_cfg.mode == "whole"
    head = config.model.decode_head
    assert (head.channels, head.dropout_ratio, head.num_classes) == (128 if lit else 256, 0.1, 150)
    backbone = config.model.backbone
    if "litv2" in file:
        assert backbone.arch in file
        assert backbone.init_cfg.checkpoint == f"pretrained/{backbone.arch}.pth"
        assert backbone.drop_path_rate == (0.3 if "litv2_b" in file else 0.2)
        assert (backbone.window_sizes, backbone.out_norms) == ((0, 0, 2, 1), (1, 2, 3))
    elif lit and "_ti_" not in file:
        assert (backbone.img_size, backbone.out_norms) == (512, (0, 1, 2, 3))


def test_a_small_litv2_takes_a_step():
    """On crops whose maps windows do not divide."""
    config = Config.fromfile(CONFIGS / LITV2.format("s"))
    config.model.data_preprocessor.size = (77, 101)
    config.model.backbone |= {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 2)}
    config.model.backbone.init_cfg = None
    config.model.neck.in_channels = [16, 16, 32, 32]
    config.model.decode_head.norm_cfg.type = "BN"  # as the command lines do on a CPU
    segmentor = build(config).train()
    wrapper = build_optim_wrapper(segmentor, config.optim_wrapper)
    before = {name: parameter.detach().clone() for name, parameter in segmentor.named_parameters()}
    labels = [PixelData(data=torch.randint(150, (1, 77, 101))) for _ in range(2)]
    samples = [SegDataSample(gt_sem_seg=label, metainfo={"img_shape": (77, 101)}) for label in labels]
    images = list(torch.randint(256, (2, 3, 77, 101), dtype=torch.uint8))
    losses = segmentor.train_step({"inputs": images, "data_samples": samples}, wrapper)
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    still = [name for name, parameter in segmentor.named_parameters() if torch.equal(parameter, before[name])]
    assert not [name for name in still if name.startswith("backbone.")]


@pytest.mark.parametrize("file", [LIT.format("ti"), LIT.format("b"), LVT])
@pytest.mark.parametrize("size", [(75, 100), (1024, 768)])
def test_sizes_of_test_time_augmentation(file, size, tmp_path):
    """The test's, shorter side 512, times the ratios, whatever the image's size is; SegFormer's rounded up to 32."""
    paths = {"img_path": str(tmp_path / "0.png"), "seg_map_path": str(tmp_path / "1.png")}
    for mode, path in zip(("RGB", "L"), paths.values(), strict=True):
        Image.new(mode, size).save(path)
    with DefaultScope.overwrite_default_scope("mmseg"):
        steps = Compose(Config.fromfile(CONFIGS / file).tta_pipeline)
    found = [view.shape[1:] for view in steps({**paths, "seg_fields": [], "reduce_zero_label": True})["inputs"]]
    expected = []
    for ratio in (0.5, 0.75, 1, 1.25, 1.5, 1.75):
        sides = [int(512 * ratio * side / min(size) + 0.5) for side in reversed(size)]
        expected += 2 * [tuple(-(-side // 32) * 32 if file == LVT else side for side in sides)]
    assert found == expected


def test_learning_rates_of_segformer():
    """Warm-up times decay, as mmcv multiplied them in the published run."""
    config = Config.fromfile(CONFIGS / LVT)
    segmentor = build(config)
    wrapper = build_optim_wrapper(segmentor, config.optim_wrapper)
    names = {id(parameter): name for name, parameter in segmentor.named_parameters()}
    *groups, _ = wrapper.param_groups  # the last one is mmengine's, for its log
    assert len(groups) == len(names)
    for group in groups:
        name = names[id(group["params"][0])]
        assert group["lr"] == pytest.approx(6e-4 if name.startswith("decode_head") else 6e-5)
        assert group["weight_decay"] == (0 if "norm" in name else 0.01)
    schedulers = [PARAM_SCHEDULERS.build({**step, "optimizer": wrapper}) for step in config.param_scheduler]
    for step in range(1, 3001):
        for scheduler in schedulers:
            scheduler.step()
        if step in (700, 3000):
            expected = 6e-5 * min(1, step / 1499) * (1 - step / 160000)
            assert wrapper.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("file", ["lit/lit_ti_fpn_demo.py", "lvt/segformer_lvt_demo.py"])
def test_demo_configs_predict(file):
    config = Config.fromfile(CONFIGS / file)
    assert tuple(config.metainfo.classes) == SEGMENTATION_CLASSES
    assert tuple(config.metainfo.palette) == PALETTE
    segmentor = build(config).eval()
    with torch.no_grad():
        assert segmentor(torch.randn(1, 3, 192, 256)).shape == (1, 14, 48, 64)


@pytest.mark.parametrize("size", [(64, 96), (77, 101)])
def test_whole_image_and_sliding_window(size):
    segmentor = build(Config.fromfile(CONFIGS / "lit/lit_ti_fpn_demo.py")).eval()
    for parameter in segmentor.parameters():  # from its start the head would give next to nothing
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    image = torch.randn(1, 3, *size)

    def logits(image, **test_cfg):
        segmentor.test_cfg = Config(test_cfg)
        with torch.no_grad():
            return segmentor.predict(image)[0].seg_logits.data

    whole = logits(image, mode="whole")
    assert whole.shape == (14, *size)
    torch.testing.assert_close(logits(image, mode="slide", crop_size=(512, 512), stride=(341, 341)), whole)
    total, count = torch.zeros(14, *size), torch.zeros(size)
    height, width = size
    for top in (0, height - 48):
        for left in (0, 30, width - 50):
            rows, columns = slice(top, top + 48), slice(left, left + 50)
            total[:, rows, columns] += logits(image[:, :, rows, columns], mode="whole")
            count[rows, columns] += 1
    windows = logits(image, mode="slide", crop_size=(48, 50), stride=(32, 30))
    torch.testing.assert_close(windows, total / count)
    assert not torch.allclose(windows, whole, rtol=0.1)
