"""Published and own checkpoints through load_state_dict, timm's doors and load_weights."""

import logging
import os
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import litvit  # noqa: F401 (registers the models)
from litvit.checkpoints import load_weights, read_state_dict, resize_position_table, resize_relative_table
from litvit.errors import InputError
from litvit.models import LIT


def tiny(**kwargs):
    config = {"img_size": 64, "num_classes": 5, "dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)}
    return LIT(**{**config, "num_heads": (0, 0, 2, 2), **kwargs})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "lit_m", "lit_b", "lvt_cls"])
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


def test_timm_doors(tmp_path, published):
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


def test_read_state_dict_prefers_averaged_weights_and_strips_prefixes(tmp_path):
    file = tmp_path / "last.pth.tar"
    plain, averaged = {"module._orig_mod.w": torch.zeros(2)}, {"_orig_mod.module.w": torch.ones(2)}
    torch.save({"state_dict": plain, "state_dict_ema": averaged, "epoch": 1}, file)
    assert same(read_state_dict(file), {"w": torch.ones(2)})
    torch.save({"state_dict": plain}, file)
    assert same(read_state_dict(file), {"w": torch.zeros(2)})
    torch.save(plain, file)
    assert same(read_state_dict(file), {"w": torch.zeros(2)})


class Code:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_unreadable_checkpoints_are_one_line(tmp_path):
    good = tmp_path / "good.pth"
    torch.save({"w": torch.zeros(10_000)}, good)
    (tmp_path / "empty.pth").touch()
    (tmp_path / "truncated.pth").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("<html>not found</html>" * 9)
    (tmp_path / "text.safetensors").write_text("<html>not found</html>" * 9)
    torch.save({"model": {"w": torch.zeros(2)}, "x": Code(tmp_path / "made")}, tmp_path / "code.pth")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(Code(tmp_path / "made")))
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    expected = {
        "missing.pth": "no checkpoint at",
        "": "is a folder",
        "empty.pth": "is empty",
        "truncated.pth": "truncated",
        "text.pth": "is no checkpoint",
        "text.safetensors": "is no checkpoint",
        "code.pth": "was not run",
        "code.pkl": "was not run",
        "none.pth": "holds no weights",
        "list.pth": "is no checkpoint",
    }
    for name, message in expected.items():
        with pytest.raises(InputError) as caught:
            read_state_dict(tmp_path / name)
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_load_weights_is_all_or_nothing(tmp_path, published):
    file, narrow = tmp_path / "lit_ti.safetensors", tmp_path / "tiny.pth"
    save_file(published("lit_ti"), file)
    torch.save(tiny(dims=(8, 16, 32, 48)).state_dict(), narrow)
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="these are the weights of lit_ti") as caught:
        load_weights(model, file)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="size mismatch") as caught:
        load_weights(model, narrow)
    assert "\n" not in str(caught.value)
    assert same(model.state_dict(), before)
    with pytest.raises(InputError, match="these are the weights of lit_ti"):
        load_weights(timm.create_model("resnet10t", num_classes=10), file, new_classifier=True)


def test_load_weights_asks_before_it_changes_the_classifier(tmp_path):
    source, model, file = tiny(num_classes=7), tiny(), tmp_path / "tiny.pth"
    torch.save({"state_dict": source.state_dict()}, file)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="holds 7 classes, the model has 5"):
        load_weights(model, file)
    assert same(model.state_dict(), before)
    load_weights(model, file, new_classifier=True)
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    model = tiny(num_classes=7)
    load_weights(model, file)
    assert same(model.state_dict(), source.state_dict())


def test_tables_that_fit_are_not_touched():
    table = torch.randn(1, 4, 6, 3)
    assert resize_position_table(table, (4, 6)) is table
    assert resize_position_table(table.bfloat16(), (8, 8)).dtype == torch.bfloat16
    table = torch.randn(2, 7, 11)
    assert resize_relative_table(table, (4, 6)) is table
    assert resize_relative_table(table, (3, 5)).shape == (2, 5, 9)


def test_relative_tables_are_resized_bicubically_with_their_gradient():
    table = torch.randn(2, 27, 13, requires_grad=True)
    for grid in ((25, 42), (4, 3)):
        ours = resize_relative_table(table, grid)
        reference = F.interpolate(table[None].double(), size=ours.shape[1:], mode="bicubic")[0]
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)
        gradient = torch.randn_like(ours)
        grads = [torch.autograd.grad(out, table, gradient.to(out))[0] for out in (ours, reference)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
