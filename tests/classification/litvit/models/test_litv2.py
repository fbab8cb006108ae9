"""LITv2 beside its published arithmetic, and as a timm model."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

import litvit  # noqa: F401 (registers the models)
from litvit.benchmarks.macs import count_macs
from litvit.benchmarks.published_litv2 import PublishedLITv2
from litvit.errors import InputError
from litvit.models import LITv2

PARAMETERS = {"litv2_s": 27_844_000, "litv2_m": 48_830_368, "litv2_b": 86_520_704}
# Published multiply-adds in 10^9 of LITv2-S by alpha.
ALPHAS = {0: 3.97, 0.2: 3.88, 0.4: 3.82, 0.5: 3.77, 0.7: 3.74, 0.9: 3.73, 1: 3.70}
TINY = {"num_classes": 5, "dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1), "num_heads": (0, 0, 4, 4)}


def tiny(**kwargs):
    torch.manual_seed(0)
    model = LITv2(**{**TINY, **kwargs})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def pair(**kwargs):
    """The published arithmetic and ours, with the same random weights, in float64."""
    torch.manual_seed(0)
    theirs, ours = PublishedLITv2(**TINY, **kwargs), LITv2(**TINY, **kwargs)
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_(std=0.3)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    return theirs.double().eval(), ours.double().eval()


def test_published_outputs(published, golden):
    theirs, ours = PublishedLITv2().eval(), timm.create_model("litv2_s").eval()
    theirs.load_state_dict(published("litv2_s"))
    assert ours.load_state_dict(published("litv2_s")) == ([], [])
    # The goldens' input: two images of numpy's standard normal numbers, seed 0.
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    expected = golden("litv2_s")["logits"]
    with torch.inference_mode():
        for model in (theirs, ours):
            assert (model(x) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_published_multiply_adds_by_alpha(alpha):
    name = "litv2_s" if alpha == 0.9 else f"litv2_s_alpha{10 * alpha:02.0f}"
    with torch.device("meta"):
        model = timm.create_model(name)
        assert model.state_dict().keys() == LITv2(alpha=alpha).state_dict().keys()
    assert count_macs(model) / 1e9 == pytest.approx(ALPHAS[alpha], rel=0.01)


def test_published_multiply_adds_at_384():
    with torch.device("meta"):
        model = timm.create_model("litv2_b.in1k_384")
    assert count_macs(model, 384) / 1e9 == pytest.approx(39.7, rel=0.01)


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0, "window_sizes": (0, 0, 4, 2)}, {"alpha": 1}])
@pytest.mark.parametrize("size", [(64, 64), (33, 97), (70, 50), (32, 224)])
def test_logits_and_dense_maps_are_the_published_ones_at_any_size(kwargs, size):
    theirs, ours = pair(**kwargs)
    x = images(*size).double()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        maps = ours.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    for i, (actual, expected) in enumerate(zip(maps, theirs.maps, strict=True)):
        assert actual.shape[1:3] == tuple(-(-side // (4 * 2**i)) for side in size)
        torch.testing.assert_close(actual, expected)


def test_gradients_are_the_published_ones():
    theirs, ours = pair()
    for model in (theirs, ours):
        model(images(70, 64).double()).square().sum().backward()
    own = LITv2.from_published({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name], msg=name)


def test_published_dense_norms_at_an_odd_size(published):
    model = timm.create_model("litv2_s", features_only=True, out_norms=(1, 2, 3)).eval()
    plain = timm.create_model("litv2_s", features_only=True).eval()
    state_dict = published("litv2_s_dense")
    assert model.load_state_dict(state_dict) == ([], [])
    norms = {name: value for name, value in state_dict.items() if name.startswith("norm")}
    plain.load_state_dict({name: value for name, value in state_dict.items() if name not in norms})
    with torch.no_grad():
        normed, raw = model(images(101, 70)), plain(images(101, 70))
    torch.testing.assert_close(normed[0], raw[0])
    for i in (1, 2, 3):
        x = raw[i].permute(0, 2, 3, 1)
        expected = F.layer_norm(x, x.shape[3:], norms[f"norm{i}.weight"], norms[f"norm{i}.bias"])
        torch.testing.assert_close(normed[i].permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_images_run_in_parts_and_all_at_once_alike(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, x = tiny().eval(), images(256, 320, batch=5)  # stage 1 has 5120 tokens per image
        seen = []
        with torch.no_grad():
            parts = model(x)
            model.stages[0].blocks[0].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
            torch.testing.assert_close(model(x), parts, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), parts, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)
    assert [tuple(output.shape) for output in seen] == [(5, 64, 80, 32)] * 2


def test_classifier_and_pooling():
    model = tiny().eval()
    x = images(64, 96)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 2, 3, 64)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean((1, 2)))
    torch.testing.assert_close(model(x), model.head(tokens.mean((1, 2))))
    model.reset_classifier(7, "max")
    assert model.get_classifier().out_features == 7
    torch.testing.assert_close(model(x), model.head(tokens.amax((1, 2))))
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    assert tiny(num_classes=0, global_pool="")(x).shape == (2, 2, 3, 64)
    assert tiny(in_chans=1)(x[:, :1]).shape == (2, 5)


def test_drop_path_rises_to_its_rate():
    model = tiny(drop_path_rate=0.4, drop_rate=0.1)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert model.head_drop.p == 0.1


def test_grad_checkpointing_changes_no_gradient():
    model = tiny()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each in (model, other):
        each(images(64, 96)).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_weight_decay_and_layer_decay_groups():
    model = tiny(out_norms=(1,))
    assert model.no_weight_decay() == set()
    scale = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scale |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    by_name = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    order = ["patch_embed.proj.weight", "stages.0.blocks.0.mlp.conv.weight", "stages.1.downsample.conv.weight"]
    order += [f"stages.2.blocks.{i}.attn.l_q.weight" for i in range(2)]
    order += ["stages.3.blocks.0.attn.l_kv.weight", "head.weight"]
    scales = [by_name[name] for name in order]
    assert scales == sorted(set(scales))
    assert by_name["norm.weight"] == by_name["out_norms.1.weight"] >= scales[-2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(dtype):
    model, x = tiny().eval(), images(64, 96)
    expected = copy.deepcopy(model).double()(x.double())
    assert (model(x) - expected).norm() < 1e-5 * expected.norm()
    with torch.autocast("cpu", dtype):
        mixed = model(x)
    mixed.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (mixed - expected).norm() < 32 * torch.finfo(dtype).eps * expected.norm()
    maps = tiny().to(dtype).eval().forward_intermediates(images(70, 40).to(dtype), intermediates_only=True)
    assert all(out.dtype == dtype for out in maps)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: tiny(window_sizes=(2, 1)),
            r"window_sizes must have one number for each of the 4 stages, got \(2, 1\)",
        ),
        (lambda: tiny(num_heads=(4, 4)), "num_heads must have one number for each of the 4 stages"),
        (lambda: tiny(window_sizes=(0, 0, 0, 1)), "window_size must be a whole number from 1, got 0"),
        (lambda: tiny(num_heads=(0, 0, 5, 4)), "num_heads must be a whole number from 1 that divides dim, 32, got 5"),
        (lambda: tiny(alpha=-0.1), "alpha must be a number from 0 to 1, got -0.1"),
        (lambda: tiny(global_pool="token"), "global_pool must be one of 'avg', 'max', ''"),
        (lambda: tiny(out_norms=(4,)), "out_norms must be stages from 0 to 3"),
        (lambda: tiny(img_size=16), "32 pixels or more per side, not img_size=16"),
        (lambda: tiny()(images(31, 64)), "32 pixels or more"),
    ],
)
def test_wrong_input_is_one_line(act, message):
    with pytest.raises(InputError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_names_addresses_and_pretrained_cfgs():
    files = {"litv2_b.in1k": "v1.0/litv2_b", "litv2_b.in1k_384": "v1.0/litv2_b_384", "litv2_m.in1k": "v1.0/litv2_m"}
    files |= {"litv2_s.in1k": "v1.0/litv2_s", "litv2_s.alpha09_in1k": "v1.1/alpha_0.9"}
    files |= {f"litv2_s_alpha{10 * alpha:02.0f}.in1k": f"v1.1/alpha_{alpha}" for alpha in ALPHAS if alpha != 0.9}
    assert timm.list_models("litv2_*", pretrained=True) == sorted(files)
    for name, file in files.items():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.url == f"https://github.com/ziplab/LITv2/releases/download/{file}.pth"
        assert (cfg.paper_ids, cfg.license, cfg.fixed_input_size) == ("arXiv:2205.13213", "apache-2.0", False)
        sized = ((3, 384, 384), 1.0) if name.endswith("_384") else ((3, 224, 224), 0.875)
        assert (cfg.input_size, cfg.crop_pct) == sized
    assert timm.get_pretrained_cfg("litv2_s").tag == "in1k"
