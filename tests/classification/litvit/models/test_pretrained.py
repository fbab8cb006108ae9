"""Published weights by name, from a server on the loopback."""

import argparse

import pytest
import timm
import torch
from server import serve

from litvit.downloads import cache_folder
from litvit.errors import InputError
from litvit.models import LIT

NAMES = ["lit_ti", "lit_s", "lit_m", "lit_b"]


@pytest.fixture(scope="module")
def weights(published, tmp_path_factory):
    """A folder with files of the published names and shapes, and what authors save beside weights."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("lit_ti", "lit_s", "lvt_cls"):
        torch.save({"model": published(name), "args": argparse.Namespace(lr=1)}, folder / f"{name}.pth")
    return folder


@pytest.fixture
def create(weights, monkeypatch, tmp_path):
    """A function that creates a model with its published weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serve(weights) as server:

        def build(name, file=None, **kwargs):
            overlay = {"url": f"{server.address}/{file or name.partition('.')[0] + '.pth'}"}
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

        yield build


def test_names_addresses_and_papers():
    assert timm.list_models("lit_*", pretrained=True) == sorted(f"{name}.in1k" for name in NAMES)
    for name in NAMES:
        cfg = timm.get_pretrained_cfg(f"{name}.in1k")
        assert cfg.url == f"https://github.com/ziplab/LIT/releases/download/v1.0/{name}.pth"
        assert (cfg.paper_ids, cfg.license) == ("arXiv:2105.14217", "apache-2.0")
    assert timm.get_pretrained_cfg_value("lvt_cls", "input_size") == (3, 224, 224)
    assert timm.get_pretrained_cfg("lvt").paper_ids == "arXiv:2112.10809"


@pytest.mark.parametrize("name", ["lit_ti", "lit_s.in1k"])
def test_the_published_weights(create, published, name):
    model = create(name)
    expected = LIT.from_published(published(name.partition(".")[0]))
    held = model.state_dict()
    assert expected.keys() == held.keys()
    assert all(torch.equal(value, held[entry]) for entry, value in expected.items())
    assert model.pretrained_cfg["file"] is None  # nothing of this machine is in what the model says of itself
    assert not model.pretrained_cfg["custom_load"]


def test_another_size_other_classes_and_channels(create, published):
    model = create("lit_ti", num_classes=3, in_chans=1, img_size=(64, 96))
    weights = published("lit_ti")
    assert model(torch.zeros(1, 1, 64, 96)).shape == (1, 3)
    torch.testing.assert_close(model.patch_embed.proj.weight, weights["patch_embed1.proj.weight"].sum(1, keepdim=True))
    assert model.stages[3].pos_embed.shape == (1, 2, 3, 512)


@pytest.mark.parametrize("kwargs", [{}, {"out_indices": (1, 2)}, {"feature_cls": "list"}])
def test_dense_maps(create, published, kwargs):
    model = create("lit_ti", features_only=True, **kwargs).eval()
    whole = timm.create_model("lit_ti").eval()
    whole.load_state_dict(published("lit_ti"))
    image = torch.randn(1, 3, 64, 64)
    maps = whole.forward_intermediates(image, intermediates_only=True)
    taken = [maps[i] for i in kwargs.get("out_indices", range(4))]
    found = [m.permute(0, 3, 1, 2) if "feature_cls" in kwargs else m for m in model(image)]
    assert len(found) == len(taken)
    for ours, theirs in zip(found, taken, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("source", ["file", "link"])
def test_weights_of_a_cfg_of_ones_own(weights, monkeypatch, tmp_path, published, source):
    """They are read as the published ones are: what lies beside them is neither run nor refused, and all must fit."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serve(weights) as server:
        places = {"file": {"file": str(weights / "{}.pth")}, "link": {"url": f"{server.address}/{{}}.pth"}}
        ti, s = ({key: text.format(name) for key, text in places[source].items()} for name in ("lit_ti", "lit_s"))
        model = timm.create_model("lit_ti", pretrained=True, pretrained_cfg={**ti, "num_classes": 1000}, num_classes=2)
        with pytest.raises(InputError, match="these are the weights of lit_s"):
            timm.create_model("lit_ti", pretrained=True, pretrained_cfg=s)
    assert torch.equal(model.norm.weight, published("lit_ti")["norm.weight"])


def test_weights_of_another_model_are_named(create):
    with pytest.raises(InputError, match="these are the weights of lit_s"):
        create("lit_ti", file="lit_s.pth")


def test_weights_that_no_program_can_fetch(weights, monkeypatch, tmp_path):
    """The error says where to get the file and where to put it. Then both names find it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("lvt", "lvt_cls"):
        with pytest.raises(InputError, match=f"github.com/Chenglin-Yang/LVT leads to .* save it as {tmp_path}"):
            timm.create_model(name, pretrained=True)
    cache_folder().mkdir(parents=True)
    (cache_folder() / "lvt.pth").symlink_to(weights / "lvt_cls.pth")
    first, second = (timm.create_model(name, pretrained=True).state_dict() for name in ("lvt", "lvt_cls"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["head.weight"], timm.create_model("lvt").head.weight)


def test_weights_of_others_and_of_no_one(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, origin in (("pvt_small", "arxiv.org/abs/2102.12122"), ("pvt_small_msa", "github.com/ziplab/LIT")):
        with pytest.raises(InputError, match=f"{origin} leads to .* save it as {tmp_path}.*/{name}.pth"):
            timm.create_model(name, pretrained=True)
    with pytest.raises(InputError, match="no weights of lit_ti_plain are published"):
        timm.create_model("lit_ti_plain", pretrained=True)


def test_hub_folders(tmp_path):
    for name, kwargs in (("lit_ti", {"img_size": 64}), ("lit_s", {"img_size": 64}), ("lvt", {})):
        model = timm.create_model(name, num_classes=3, in_chans=1, **kwargs).eval()
        timm.models.save_for_hf(model, tmp_path / name, safe_serialization="both")
        loaded = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        image = torch.randn(2, 1, 64, 64)
        assert torch.equal(loaded(image), model(image))
