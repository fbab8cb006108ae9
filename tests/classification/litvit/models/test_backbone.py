"""What LIT and LVT share."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath

import litvit  # noqa: F401 (registers the models)

SHALLOW = {"depths": (1, 1, 1, 1), "dims": (96, 32, 32, 32), "num_heads": (0, 0, 2, 2)}


def test_stochastic_depth_alone_draws_for_images():
    torch.manual_seed(0)
    model = timm.create_model("lit_s", num_classes=5, **SHALLOW).eval()
    block = model.stages[0].blocks[0]
    block.drop_path = DropPath(0.5).eval()
    x = torch.randn(8, 56, 56, 96)
    with torch.no_grad():
        sure = model.stages[0](x)
        block.drop_path.train()
        dropped = (model.stages[0](x) == x).all(-1).flatten(1).double().mean(1)
    assert (sure != x).any(-1).all()
    assert sorted(set(dropped.tolist())) == [0, 1]


def test_batches_of_any_number():
    torch.manual_seed(0)
    model = timm.create_model("lit_s", features_only=True, out_indices=(0, 1), **SHALLOW).eval()
    x = torch.randn(7, 3, 224, 224)
    expected = model(x)
    with torch.no_grad():
        for ours, whole in zip(model(x), expected, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)
        assert [out.shape[0] for out in model(x[:0])] == [0, 0]


@pytest.mark.parametrize(
    ("name", "path"), [("lit_ti", None), ("lit_s", None), ("lit_s", "plain"), ("lit_s", "sdpa"), ("lvt", None)]
)
def test_no_images(name, path, monkeypatch):
    if path:
        monkeypatch.setenv("LIT_ATTENTION", path)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.1).eval()
    x = torch.zeros(0, 3, 224, 224)
    with torch.no_grad():
        assert model(x).shape == (0, 5)
        assert model.forward_features(x).shape[0] == 0
        assert [out.shape[0] for out in model.forward_intermediates(x, intermediates_only=True)] == [0] * 4
    before = [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]
    model.train()(x).sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    torch.testing.assert_close([buffer for name, buffer in model.named_buffers() if "running" in name], before)
    if name == "lvt":
        assert [scores.shape for scores in model(x, torch.eye(7, dtype=torch.bool))] == [(0, 5), (0, 49, 5)]


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "lvt"])
def test_weights_save_as_they_are(name, tmp_path):
    model = timm.create_model(name)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
