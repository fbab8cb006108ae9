"""Checkpoints read safely, and loaded by load_weights."""

import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

import litvit  # noqa: F401 (registers the models)
from litvit.checkpoints import load_weights, read_state_dict
from litvit.errors import InputError
from litvit.models import LIT


def tiny(**kwargs):
    config = {"img_size": 64, "num_classes": 5, "dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)}
    return LIT(**{**config, "num_heads": (0, 0, 2, 2), **kwargs})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Code:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_read_state_dict_prefers_averaged_weights_and_strips_prefixes(tmp_path):
    file = tmp_path / "last.pth.tar"
    plain, averaged = {"module._orig_mod.w": torch.zeros(2)}, {"_orig_mod.module.w": torch.ones(2)}
    torch.save({"state_dict": plain, "state_dict_ema": averaged, "epoch": 1}, file)
    assert same(read_state_dict(file), {"w": torch.ones(2)})
    torch.save({"state_dict": plain}, file)
    assert same(read_state_dict(file), {"w": torch.zeros(2)})
    torch.save(plain, file)
    assert same(read_state_dict(file), {"w": torch.zeros(2)})


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
