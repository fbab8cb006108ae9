"""Published and own state dicts through load_state_dict and timm."""

import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import litvit  # noqa: F401 (registers the models)
from litvit.models import LIT, identify_model


def tiny(cls=LIT, **kwargs):
    config = {"img_size": 64, "num_classes": 5, "dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)}
    return cls(**{**config, "num_heads": (0, 0, 2, 2), **kwargs})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "name",
    ["lit_ti", "lit_s", "lit_m", "lit_b", "litv2_s", "litv2_m", "litv2_b", "lvt_cls", "pvt_small", "pvt_small_msa"],
)
@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 0}, {"features_only": True, "out_indices": (1, 2)}])
def test_published_names_load_strictly(name, kwargs, published):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    state_dict = published(name, numbers=False)
    before = dict(state_dict)
    assert model.load_state_dict(state_dict, assign=True) == ([], [])
    assert state_dict == before


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lit_ti_dense", {}),
        ("lit_s_dense", {"img_size": 800, "out_norms": (1, 2, 3)}),
        ("lit_s_dense", {"img_size": 512, "out_norms": (1, 2, 3)}),
        ("litv2_s_dense", {"out_norms": (1, 2, 3)}),
        ("lvt_dense", {}),
    ],
)
def test_published_dense_names_load_strictly(name, kwargs, published):
    model = timm.create_model(name.removesuffix("_dense"), features_only=True, **kwargs)
    state_dict = published(name)
    assert model.load_state_dict(state_dict) == ([], [])
    # As in a detector, under a prefix.
    detector = nn.ModuleDict({"backbone": model.model})
    prefixed = {f"backbone.{key}": value for key, value in state_dict.items()}
    assert detector.load_state_dict(prefixed) == ([], [])


def test_another_image_size_resizes_the_tables(published):
    state_dict = published("lit_s")
    model = timm.create_model("lit_s", img_size=(256, 192))
    assert model.load_state_dict(state_dict) == ([], [])
    table = state_dict["layers.2.blocks.0.attn.relative_position_bias_table"].view(1, 27, 27, 12).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, size=(31, 23), mode="bicubic")[0]
    torch.testing.assert_close(model.stages[2].blocks[0].attn.relative_position_bias_table.data, expected)

    state_dict = published("lit_ti")
    model = timm.create_model("lit_ti", img_size=(256, 192))
    assert model.load_state_dict(state_dict) == ([], [])
    table = state_dict["pos_embed4"][:, 1:].view(1, 7, 7, 512).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, size=(8, 6), mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(model.stages[3].pos_embed.data, expected)
    torch.testing.assert_close(model.cls_pos_embed.data, state_dict["pos_embed4"][:, :1])


@pytest.mark.parametrize("kwargs", [{}, {"position": "absolute", "class_token": True, "global_pool": "token"}])
def test_own_checkpoints_load_at_any_size(kwargs):
    source = tiny(img_size=(64, 96), **kwargs)
    state_dict = source.state_dict()
    model = tiny(img_size=(64, 96), **kwargs)
    model.load_state_dict(state_dict)
    assert same(model.state_dict(), state_dict)
    assert tiny(img_size=128, **kwargs).load_state_dict(state_dict) == ([], [])


def test_another_models_entries_are_not_dropped_in_silence():
    state_dict = tiny(depths=(1, 1, 2, 1)).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        tiny().load_state_dict(state_dict)


def test_another_number_of_classes_keeps_the_models_classifier(caplog):
    source, model = tiny(num_classes=7), tiny()
    head = model.head.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(source.state_dict())
    assert "7 classes" in caplog.text
    assert "has 5" in caplog.text
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_timm_loads_published_files(tmp_path, published):
    state_dict = published("lit_ti")
    file = tmp_path / "lit_ti.pth"
    torch.save({"model": {f"module.{name}": value for name, value in state_dict.items()}, "epoch": 3}, file)
    safe = tmp_path / "lit_ti.safetensors"
    save_file(state_dict, safe)
    weight = state_dict["patch_embed1.proj.weight"]

    model = timm.create_model("lit_ti", num_classes=10, checkpoint_path=str(file))
    assert torch.equal(model.patch_embed.proj.weight, weight)
    assert model.head.weight.shape == (10, 512)
    model = timm.create_model("lit_ti", features_only=True, checkpoint_path=str(safe))
    assert torch.equal(model.model.patch_embed.proj.weight, weight)
    overlay = {"file": str(file)}
    model = timm.create_model("lit_ti", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=3)
    torch.testing.assert_close(model.patch_embed.proj.weight, weight.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "name",
    ["lit_ti", "lit_s", "lit_m", "lit_b", "litv2_s", "litv2_m", "litv2_b", "lvt_cls", "pvt_small", "pvt_small_msa"],
)
def test_models_are_identified_by_their_layers(name, published):
    theirs = published(name, numbers=False)
    with torch.device("meta"):
        ours = timm.create_model(name, num_classes=7).state_dict()
    for state_dict in (theirs, ours):
        assert identify_model(state_dict) == name.removesuffix("_cls")
    assert identify_model(tiny().state_dict()) is None


def test_a_class_translates_its_own_published_names():
    class Renamed(LIT):
        @staticmethod
        def from_published(state_dict):
            return {name.replace("tower", "stages"): value for name, value in state_dict.items()}

    source = tiny().state_dict()
    published = {f"model.{name.replace('stages', 'tower')}": value for name, value in source.items()}
    model = nn.ModuleDict({"model": tiny(Renamed)})
    assert model.load_state_dict(published) == ([], [])
    assert same(model["model"].state_dict(), source)
