"""What LIT, LITv2 and LVT share."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_input_data_config
from timm.layers import DropPath
from timm.models import save_for_hf
from torch import nn

import litvit  # noqa: F401 (registers the models)
from litvit.errors import InputError
from litvit.models import Backbone

SMALL = {
    "lit_ti": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "lit_s": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "pvt_small": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 4)},
    "litv2_s": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "lvt": {"dims": (8, 8, 16, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4), "class_heads": 4},
}
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


@torch.no_grad()
def test_a_class_token_joins_without_code_of_the_subclass():
    model = timm.create_model("lit_ti", img_size=64, num_classes=5, **SMALL["lit_ti"]).eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = Backbone.forward_features(model, x)
    assert tokens.shape == (2, 5, 64)
    torch.testing.assert_close(tokens, model.forward_features(x))


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
    ("name", "path"),
    [
        ("lit_ti", None),
        ("lit_s", None),
        ("lit_s", "plain"),
        ("lit_s", "sdpa"),
        ("lvt", None),
        ("litv2_s", None),
        ("pvt_small", None),
    ],
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


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "litv2_s", "lvt"])
def test_weights_save_as_they_are(name, tmp_path):
    model = timm.create_model(name)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert nn.utils.parameters_to_vector(model.parameters()).isfinite().all()


def small(name, img_size=64, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=img_size, **SMALL[name], **kwargs).eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_prefix_tokens_come_with_the_maps(name):
    model, x = small(name), images(64, 96)
    if name != "lvt":
        model.set_input_size((64, 96))
    features, maps = model.forward_intermediates(x)
    expected = model.forward_features(x)
    torch.testing.assert_close(features, expected)
    with_prefix = model.forward_intermediates(x, norm=True, return_prefix_tokens=True, intermediates_only=True)
    if name in ("lit_s", "litv2_s"):
        assert [tuple(out.shape) for out in with_prefix] == [tuple(out.shape) for out in maps]
        return
    for i, ((out, prefix), alone) in enumerate(zip(with_prefix, maps, strict=True)):
        assert prefix.shape == (2, 1, alone.shape[1])
        if i < 3:
            torch.testing.assert_close(out, alone)
            assert not prefix.any()
    torch.testing.assert_close(with_prefix[-1][1], expected[:, :1])
    (_, prefix), *_ = model.forward_intermediates(x, [3], return_prefix_tokens=True)[1]
    torch.testing.assert_close(model.norm(prefix), expected[:, :1])
    ((_, prefix),) = model.forward_intermediates(x, [1], return_prefix_tokens=True, intermediates_only=True)
    assert not prefix.any()


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_in_a_dictionary(name):
    model, x = small(name), images(64, 64)
    features, maps = model.forward_intermediates(x, [0, 3])
    found = model.forward_intermediates(x, [0, 3], output_dict=True, return_prefix_tokens=True)
    prefix = found.pop("image_intermediates_prefix", None)
    assert [tuple(out.shape) for out in prefix or ()] == [
        (2, 1, out.shape[1]) for out in maps if name not in ("lit_s", "litv2_s")
    ]
    torch.testing.assert_close(found, {"image_intermediates": maps, "image_features": features})
    assert list(model.forward_intermediates(x, output_dict=True, intermediates_only=True)) == ["image_intermediates"]


@pytest.mark.parametrize("name", SMALL)
def test_another_input_size_is_that_of_a_model_built_so(name, tmp_path):
    model, size = small(name).requires_grad_(False), (96, 64)
    built = small(name, img_size=size)
    built.load_state_dict(model.state_dict())
    model.set_input_size(size)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(images(*size)), built(images(*size)))
    save_for_hf(model, tmp_path, safe_serialization="both")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images(*size)), model(images(*size)))
    for sized in (model, built, loaded):
        found = resolve_input_data_config(sized)["input_size"]
        assert found == ((3, 224, 224) if name in ("lvt", "litv2_s") else (3, *size))  # these take any size


@pytest.mark.parametrize("size", [16, 0, (64, 31), 100])
@pytest.mark.parametrize("name", SMALL)
def test_input_sizes_that_do_not_fit(name, size):
    if name in ("lvt", "litv2_s") and size == 100:
        return
    model = small(name)
    for act in (lambda: model.set_input_size(size), lambda: small(name, img_size=size)):
        with pytest.raises(InputError, match="multiple of 32|32 pixels or more"):
            act()
    model(images(64, 64))


@pytest.mark.parametrize("kwargs", [{"num_classes": 5}, {"features_only": True}])
@pytest.mark.parametrize("name", SMALL)
def test_device_and_dtype_of_the_parameters(name, kwargs):
    model = small(name, **kwargs)
    state, x = model.state_dict(), images(64, 64)
    expected = model(x)
    meta = small(name, device="meta", dtype=torch.float64, **kwargs)
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
    assert {parameter.dtype for parameter in meta.parameters()} == {torch.float64}
    emptied = meta.to_empty(device="cpu")
    emptied.load_state_dict(state)
    torch.testing.assert_close(emptied(x.double()), expected, check_dtype=False, rtol=1e-4, atol=1e-5)
    assigned = small(name, device="meta", **kwargs)
    assigned.load_state_dict(state, assign=True)
    torch.testing.assert_close(assigned(x), expected)
    assert next(iter(small(name, dtype=torch.bfloat16).parameters())).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SMALL)
def test_dropout_rates(name):
    x = images(64, 64)
    for kwargs, part in (({"proj_drop_rate": 0.5}, "mlp"), ({"attn_drop_rate": 0.5}, "attn_drop")):
        model, plain = small(name, num_classes=5, **kwargs), small(name, num_classes=5)
        torch.testing.assert_close(model(x), plain(x))
        rates = {path: module.p for path, module in model.named_modules() if isinstance(module, nn.Dropout)}
        assert sum(rate == 0.5 for rate in rates.values()) > 1
        assert all(rate == 0.5 for path, rate in rates.items() if part in path)
        assert rates["head_drop"] == 0
        for module in model.modules():
            module.training = isinstance(module, nn.Dropout)  # BatchNorm as in evaluation
        assert not torch.equal(model(x), model(x))
        model(x).sum().backward()


@pytest.mark.parametrize("name", SMALL)
def test_max_pooling(name):
    model, x = small(name, global_pool="max", num_classes=5), images(64, 64)
    tokens = model.forward_features(x).flatten(1, -2)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), tokens.amax(1))
    model.reset_classifier(7, "avg")
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), tokens.mean(1))
    assert model(x).shape == (2, 7)
    assert not any(module.training for module in model.modules())
