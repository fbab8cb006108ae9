"""The backbones in mmengine's registry: features, checkpoints by every entry point, settings of a config."""

import copy
import os
import subprocess
import sys
from collections import Counter

import mmdet.registry
import mmseg.registry
import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing
import torch.nn.functional as F
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from safetensors.torch import save_file
from torch import nn

from litvit.benchmarks.published_litv2 import PublishedLITv2
from litvit.errors import InputError

TINY = {
    "type": "LIT",
    "dims": (16, 32, 40, 64),
    "depths": (1, 1, 1, 1),
    "mlp_ratios": (2, 2, 2, 2),
    "num_heads": (0, 0, 5, 8),
    "img_size": 64,
}
PVT = {**TINY, "arch": "pvt_small", "num_heads": (1, 2, 2, 4)}
RELATIVE = {**TINY, "arch": "lit_s", "num_heads": (0, 0, 2, 2), "out_norms": (1, 2, 3)}
HILO = {**RELATIVE, "arch": "litv2_s", "alpha": 0.5}
DENSE = {
    "lit_ti_dense": {"type": "LIT"},
    "lit_s_dense": {"type": "LIT", "arch": "lit_s", "img_size": 800, "out_norms": (1, 2, 3)},
    "lvt_dense": {"type": "LVT"},
    "litv2_s_dense": {"type": "LIT", "arch": "litv2_s", "out_norms": (1, 2, 3)},
}


@pytest.mark.parametrize("registry", [mmdet.registry.MODELS, mmseg.registry.MODELS])
@pytest.mark.parametrize(("type_", "arch"), [("LIT", "lit_ti"), ("LIT", "litv2_s"), ("LVT", "lvt")])
def test_one_backbone_for_mmdet_and_mmseg(registry, type_, arch):
    backbone = registry.build({"type": type_, "arch": arch, "out_indices": (1, 3)}).eval()
    model = timm.create_model(arch, features_only=True, out_indices=(1, 3)).eval()
    assert list(backbone.state_dict()) == list(model.model.state_dict())
    model.model.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, 70, 100)
    maps = backbone(images)
    assert isinstance(maps, tuple)
    for ours, theirs in zip(maps, model(images), strict=True):
        assert torch.equal(ours, theirs)


def test_swin_with_token_merging_is_a_backbone(tmp_path):
    small = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
    classifier = timm.create_model("swin_tiny_dtm", **small)
    torch.save(classifier.state_dict(), tmp_path / "swin.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "swin.pth")}
    backbone = MODELS.build({"type": "Swin", **small, "frozen_stages": 2, "with_cp": True, "init_cfg": init})
    backbone.init_weights()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[key])
    maps = backbone.train()(torch.randn(1, 3, 68, 100))
    assert [tuple(features.shape) for features in maps] == [
        *((1, 24, 17, 25), (1, 48, 9, 13), (1, 96, 5, 7), (1, 192, 3, 4))
    ]
    sum(features.sum() for features in maps).backward()
    trained = {name.split(".")[1] for name, value in backbone.named_parameters() if value.grad is not None}
    assert trained == {"2", "3"}
    offsets = [value for name, value in backbone.named_parameters() if name.endswith("offset.weight")]
    assert [value.grad is not None for value in offsets] == [False, True, True]


@pytest.mark.parametrize("name", DENSE)
def test_published_dense_checkpoints_load_by_every_entry_point(name, published, tmp_path):
    entries = {f"backbone.{key}": value for key, value in published(name).items()}
    file = tmp_path / "detector.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": entries}, file)
    reference = MODELS.build(DENSE[name])
    reference.model.load_state_dict(published(name))

    plain = nn.ModuleDict({"backbone": MODELS.build(DENSE[name])})
    assert plain.load_state_dict(entries) == ([], [])
    engine = nn.ModuleDict({"backbone": MODELS.build(DENSE[name])})
    load_state_dict(engine, CheckpointLoader.load_checkpoint(str(file))["state_dict"], strict=True)
    pretrained = {"type": "Pretrained", "checkpoint": str(file), "prefix": "backbone."}
    config = MODELS.build({**DENSE[name], "init_cfg": pretrained})
    config.init_weights()
    for backbone in (plain["backbone"], engine["backbone"], config):
        for key, value in reference.state_dict().items():
            assert torch.equal(backbone.state_dict()[key], value), key


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("size", [(800, 1344), (75, 101), (32, 33)])
def test_maps_of_litv2_are_the_published_ones_where_windows_do_not_divide_them(window, size):
    torch.manual_seed(0)
    config = {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1), "num_heads": (0, 0, 2, 2), "alpha": 0.5}
    config["window_sizes"] = (0, 0, window, 1)
    theirs = PublishedLITv2(**config).eval()
    norms = {f"norm{i}.{part}": torch.randn(8 * 2**i) for i in (1, 2, 3) for part in ("weight", "bias")}
    ours = MODELS.build({"type": "LIT", "arch": "litv2_s", "out_norms": (1, 2, 3), **config}).eval()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if "head" not in name} | norms)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps, _ = ours(images), theirs(images)
    for i, (actual, expected) in enumerate(zip(maps, theirs.maps, strict=True)):
        if i:
            expected = F.layer_norm(expected, expected.shape[3:], norms[f"norm{i}.weight"], norms[f"norm{i}.bias"])
        torch.testing.assert_close(actual.permute(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-4)


def test_imagenet_weights_load_and_norms_of_the_maps_keep_their_initial_values(published, tmp_path):
    torch.save({"model": published("lit_s")}, tmp_path / "lit_s.pth")
    classifier = timm.create_model("lit_s")
    classifier.load_state_dict(published("lit_s"))
    save_file(classifier.state_dict(), tmp_path / "own.safetensors")
    lightning = {f"model.{name}": value for name, value in classifier.state_dict().items()}
    torch.save({"state_dict": lightning | {"loss.weight": torch.ones(3)}}, tmp_path / "lightning.ckpt")
    for file in ("lit_s.pth", "lightning.ckpt", "own.safetensors"):
        init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / file)}
        backbone = MODELS.build({**DENSE["lit_s_dense"], "img_size": 256, "init_cfg": init_cfg})
        backbone.init_weights()
        assert torch.equal(backbone.patch_embed.proj.weight, classifier.patch_embed.proj.weight)
        assert backbone.stages[2].blocks[0].attn.relative_position_bias_table.shape == (12, 31, 31)
        assert torch.equal(backbone.out_norms["1"].weight, torch.ones(192))
    other = MODELS.build({"type": "LIT", "init_cfg": init_cfg})
    with pytest.raises(InputError, match="does not fit lit_ti: these are the weights of lit_s"):
        other.init_weights()
    missing = MODELS.build({"type": "LIT", "init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "no.pth")}})
    with pytest.raises(InputError, match="no checkpoint at"):
        missing.init_weights()


class Call:
    """Unpickled carelessly, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_no_checkpoint_runs_code(tmp_path):
    made = tmp_path / "made"
    for i, call in enumerate([Call(os.mkdir, str(made)), Call(getattr, HistoryBuffer, "__init__")]):
        file = tmp_path / f"{i}.pth"
        torch.save({"state_dict": {"w": torch.zeros(2)}, "x": call}, file)
        with pytest.raises(InputError, match="was not run"):
            CheckpointLoader.load_checkpoint(str(file))
        with pytest.raises(InputError, match="was not run"):
            MODELS.build({**TINY, "init_cfg": {"type": "Pretrained", "checkpoint": str(file)}}).init_weights()
    assert not made.exists()


def test_what_mmengine_saves_besides_weights_is_read(tmp_path):
    history = HistoryBuffer()
    for value in (1.0, 2.0, 6.0):
        history.update(value)
    torch.save({"message_hub": {"log_scalars": {"loss": history}}, "state_dict": {}}, tmp_path / "epoch_1.pth")
    read = CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_1.pth"))["message_hub"]["log_scalars"]["loss"]
    assert read.statistics("mean") == 3
    assert read.statistics("max") == 6
    read.update(8.0)
    torch.save({"message_hub": {"log_scalars": {"loss": read}}}, tmp_path / "epoch_2.pth")
    assert b"_Array" not in (tmp_path / "epoch_2.pth").read_bytes()  # any other program reads it
    again = CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_2.pth"))["message_hub"]["log_scalars"]["loss"]
    assert again.statistics("max") == 8


def test_a_checkpoint_cannot_have_addresses_read(tmp_path):
    """An array of objects made of bytes: its elements would be addresses, which Counter asks for their hash."""
    file = tmp_path / "evil.pth"
    torch.save({"x": Call(Counter, Call(np.ndarray, (1,), "O", b"\x41" * 8))}, file)
    program = f"from litvit.openmmlab.checkpoints import load_from_file; print(*load_from_file({str(file)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("x\n")


def gradients(backbone):
    torch.manual_seed(0)
    sum(out.square().mean() for out in backbone(torch.randn(2, 3, 64, 96))).backward()
    return {name: parameter.grad for name, parameter in backbone.named_parameters()}


@pytest.mark.parametrize("config", [TINY, RELATIVE, PVT, HILO, {"type": "LVT"}])
def test_every_parameter_gets_a_gradient_also_with_checkpointing(config):
    backbone = MODELS.build(config).train()
    again = MODELS.build({**config, "with_cp": True}).train()
    again.load_state_dict(backbone.state_dict())
    grads, others = gradients(backbone), gradients(again)
    assert all(grad is not None for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad)


@pytest.mark.parametrize("config", [RELATIVE, HILO, {"type": "LVT"}])
def test_frozen_stages_stay_as_they_are(config):
    backbone = MODELS.build({**config, "frozen_stages": 2, "norm_eval": True}).train()
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith(("patch_embed.", "stages.0.", "stages.1.", "out_norms.1.")) for name in frozen)
    assert all(
        name in frozen for name, _ in backbone.named_parameters() if name.startswith(("patch_embed.", "stages.1."))
    )
    assert not backbone.stages[1].training
    assert backbone.stages[2].training
    assert not any(module.training for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    first = MODELS.build({**config, "frozen_stages": 0})
    assert all("patch_embed" in name for name, parameter in first.named_parameters() if not parameter.requires_grad)


def test_a_copy_is_a_backbone_of_its_own():
    backbone = MODELS.build(TINY).eval()
    images = torch.randn(1, 3, 64, 64)
    other = copy.deepcopy(backbone)
    before = backbone(images)
    nn.init.zeros_(other.patch_embed.norm.weight)
    assert torch.equal(backbone(images)[0], before[0])
    assert not torch.equal(other(images)[0], before[0])


def test_wrong_arguments_are_one_line():
    with pytest.raises(
        InputError, match="unknown arch 'lit_x' of LIT: there are lit_b, lit_m, lit_s, .*, litv2_b, .*, pvt_tiny"
    ):
        MODELS.build({"type": "LIT", "arch": "lit_x"})
    with pytest.raises(InputError, match="unknown arch 'lit_s' of LVT"):
        MODELS.build({"type": "LVT", "arch": "lit_s"})
    with pytest.raises(InputError, match="unexpected keyword argument 'window_size'"):
        MODELS.build({"type": "LIT", "window_size": 7})
