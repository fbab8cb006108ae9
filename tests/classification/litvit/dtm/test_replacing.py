"""Deformable token merging in place of the downsampling of timm's models."""

import copy

import pytest
import timm
import torch
from timm.models import GraphExtractNet
from torch import nn

import litvit  # noqa: F401 (registers the models)
from litvit.dtm import DeformableTokenMerging, offset_parameters, replace_merging
from litvit.errors import InputError
from litvit.training.optimizer import parameter_groups

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 8, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1)}
MODELS = {  # arguments of a small model, and the names of what is replaced
    "swin_tiny_patch4_window7_224": (SWIN, "layers.{}.downsample"),
    "swinv2_tiny_window8_256": (SWIN, "layers.{}.downsample"),
    "convnext_atto": ({"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}, "stages.{}.downsample"),
    "pvt_v2_b0": ({"embed_dims": (8, 16, 40, 64), "depths": (1, 1, 1, 1)}, "stages.{}.downsample"),
    "pvt_small": ({"img_size": 64, "dims": (8, 16, 40, 64), "depths": (1, 1, 1, 1)}, "stages.{}.downsample"),
}


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **MODELS[name][0], **kwargs)


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_downsampling_is_replaced_and_nothing_else(name):
    model = create(name, num_classes=5)
    before, paths = model.state_dict(), [MODELS[name][1].format(i) for i in (1, 2, 3)]
    modules = dict(model.named_modules())
    replaced = replace_merging(model)
    assert replaced == {path: modules[path] for path in paths}
    after = model.state_dict()
    merging = ("offset.weight", "offset.bias", "conv.weight", "conv.bias", "norm.weight", "norm.bias")
    buffers = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    rest = [key for key in before if not key.startswith(tuple(paths))]
    assert all(torch.equal(before[key], after[key]) for key in rest)
    assert set(after) == {*rest, *(f"{path}.{part}" for path in paths for part in (*merging, *buffers))}
    assert len(offset_parameters(model)) == 6
    assert {group["lr"] for group in parameter_groups(model, 0.05, lr=1.0)} == {1.0, 0.01}
    model(images(64, 64)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in offset_parameters(model))


class StridedConvolution(nn.Module):
    """Merging without offsets: zeros around odd maps, 2 x 2 convolution, BatchNorm, GELU."""

    def __init__(self, merging):
        super().__init__()
        self.conv, self.norm = copy.deepcopy(merging.conv), copy.deepcopy(merging.norm)

    def forward(self, x):
        x = nn.functional.pad(x.permute(0, 3, 1, 2), (0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return nn.functional.gelu(self.norm(self.conv(x))).permute(0, 2, 3, 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("img_size", [64, (100, 72)])  # (100, 72): maps of 25 x 18, 13 x 9, 7 x 5, 4 x 3
def test_at_zero_offsets_a_swin_is_that_with_convolutions(img_size, training):
    kwargs = {**SWIN, "img_size": img_size, "drop_path_rate": 0.0, "num_classes": 5}
    model = timm.create_model("swin_tiny_patch4_window7_224", **kwargs)
    replaced = replace_merging(model)
    for path in replaced:
        norm = model.get_submodule(path).norm
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
    convolutions = copy.deepcopy(model)
    for i in (1, 2, 3):
        convolutions.layers[i].downsample = StridedConvolution(model.layers[i].downsample)
    size = (64, 64) if img_size == 64 else img_size
    ours, expected = (each.train(training)(images(*size)) for each in (model, convolutions))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convnext_atto", "pvt_v2_b0"])
def test_maps_keep_their_sizes_at_any_image_size(name):
    model, dense = (create(name, features_only=True).eval() for _ in range(2))
    replaced = replace_merging(dense)
    assert len(replaced) == 3
    for size in ((64, 64), (100, 72), (93, 75)):
        assert [x.shape for x in dense(images(*size))] == [x.shape for x in model(images(*size))]


def test_type_device_and_mode_are_those_of_the_model():
    model = create("convnext_atto").double().eval()
    replace_merging(model)
    assert model(images(64, 64).double()).dtype == torch.float64
    assert not any(module.training for module in model.modules())
    with torch.device("meta"):
        model = create("convnext_atto")
    replace_merging(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_pvt_becomes_the_registered_ablation():
    model = create("pvt_small")
    replace_merging(model)
    expected = timm.create_model("pvt_small_dtm", **MODELS["pvt_small"][0])
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(images(64, 64)), expected.eval()(images(64, 64)))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resnet18", "lit_ti", "efficientnet_b0"])
def test_models_without_such_downsampling_are_refused_as_they_are(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = [*model.modules()]
    with pytest.raises(InputError, match="has no 2 x 2 downsampling between stages"):
        replace_merging(model)
    assert [*model.modules()] == before


def test_a_wrong_image_size_is_one_line():
    with pytest.raises(InputError, match="SwinTransformer does not run on images of 60 x 60 pixels: name its img_size"):
        replace_merging(create("swin_tiny_patch4_window7_224"), 60)


def test_swin_tiny_dtm():
    kwargs = {**SWIN, "num_classes": 5}
    model = timm.create_model("swin_tiny_dtm", **kwargs).eval()
    assert [type(layer.downsample).__mro__[1] for layer in model.layers[1:]] == [DeformableTokenMerging] * 3
    other = timm.create_model("swin_tiny_patch4_window7_224", **kwargs)
    replace_merging(other)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(images(64, 64)), model(images(64, 64)))
    x = images(64, 64)
    for run in (
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (x,)).module(),
        GraphExtractNet(model, ["head"], squeeze_out=True),
    ):
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    dense = timm.create_model("swin_tiny_dtm", **SWIN, features_only=True, out_indices=(1, 3), strict_img_size=False)
    assert [tuple(out.shape) for out in dense(images(96, 72))] == [(2, 12, 9, 16), (2, 3, 3, 64)]
    model.set_input_size((96, 64))
    assert model(images(96, 64)).shape == (2, 5)
    assert timm.create_model("swin_tiny_dtm", **SWIN, in_chans=1)(x[:, :1]).shape == (2, 1000)
