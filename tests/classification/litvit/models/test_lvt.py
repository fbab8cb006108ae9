"""LVT beside its published arithmetic, and as a timm model."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import litvit  # noqa: F401 (registers the models)
from litvit.benchmarks.macs import count_macs
from litvit.benchmarks.published_lvt import PublishedLVT
from litvit.errors import InputError
from litvit.models import LVT


def tiny(**kwargs):
    torch.manual_seed(0)
    config = {"num_classes": 5, "dims": (8, 8, 16, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4)}
    model = LVT(**{**config, "mlp_ratios": (2, 2, 2, 2), "class_heads": 4, **kwargs})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair(published):
    """The published arithmetic and ours, with the same weights."""
    theirs, ours = PublishedLVT().eval(), timm.create_model("lvt").eval()
    theirs.load_state_dict(published("lvt_cls"))
    assert ours.load_state_dict(published("lvt_cls")) == ([], [])
    return theirs, ours


def close(actual, expected, tolerance=1e-5):
    return (actual - expected).norm() < tolerance * expected.norm()


def test_published_outputs(pair, golden):
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        for model in pair:
            assert close(model(x), golden("lvt")["logits"])


def test_published_parameters_and_multiply_adds():
    with torch.device("meta"):
        model = timm.create_model("lvt")
        backbone = timm.create_model("lvt", features_only=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_521_844
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 3_429_092
    assert count_macs(model) / 1e9 == pytest.approx(0.89, abs=0.005)


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (70, 97), (33, 50)])
def test_dense_maps_are_the_published_ones_at_any_size(pair, size):
    theirs, ours = pair
    x = images(*size)
    with torch.inference_mode():
        theirs(x)
        maps = ours.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    for i, (actual, expected) in enumerate(zip(maps, theirs.maps, strict=True)):
        assert actual.shape[1:3] == tuple(-(-side // (4 * 2**i)) for side in size)
        assert close(actual, expected)


def test_gradients_are_the_published_ones(pair):
    theirs, ours = pair
    x = images(96, 64)
    for model in pair:
        model.zero_grad()
        model(x).square().sum().backward()
    mine = timm.create_model("lvt")
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert mine.load_state_dict(gradients) == ([], [])
    for (name, expected), parameter in zip(mine.state_dict().items(), ours.parameters(), strict=True):
        assert close(parameter.grad, expected, 1e-4), name


def test_mixed_tokens_are_the_published_ones(pair):
    theirs, ours = pair
    x = images(96, 128, batch=3)
    mixed = torch.zeros(3, 4, dtype=torch.bool)
    mixed[1:3, 0:2] = True
    with torch.inference_mode():
        for actual, expected in zip(ours(x, mixed), theirs(x, (1, 0, 3, 2)), strict=True):
            assert close(actual, expected)


def test_mix_token_pastes_and_unmixes_the_box():
    model = tiny().eval()
    seen = []
    model.stages[0].patch_embed.register_forward_hook(lambda module, args, output: seen.append(output))
    model.stages[0].blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = images(96, 96, batch=3)
    mixed = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    tokens = []
    model.aux_head.register_forward_hook(lambda module, args, output: tokens.append(output))
    with torch.no_grad():
        _, scores = model(x, mixed)
    before, after = seen
    assert before.shape == (3, 24, 24, 8)
    expected = before.clone()
    expected[:, :16, 8:] = before[[2, 1, 0], :16, 8:]
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    expected = tokens[0].view(3, 3, 3, 5).clone()
    expected[:, :2, 1:] = expected[[2, 1, 0], :2, 1:]
    torch.testing.assert_close(scores, expected.view(3, 9, 5), rtol=0, atol=0)
    nothing, everything = torch.zeros(3, 3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    with torch.no_grad():
        plain, turned = model(x, nothing), model(x, everything)
    torch.testing.assert_close(turned[0], plain[0].flip(0))
    torch.testing.assert_close(turned[1], plain[1])


def test_scores_are_the_class_tokens_and_half_of_the_best_tokens():
    model = tiny().eval()
    x = images(64, 96)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 6, 32)
    expected = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).max(1)[0]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    torch.testing.assert_close(model.train()(x), expected)


def test_classifier_and_pooling():
    model = tiny().eval()
    x = images(64, 64)
    model.reset_classifier(7, "avg")
    assert model.get_classifier().out_features == model.aux_head.out_features == 7
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    assert tiny(num_classes=0, global_pool="")(x).shape == (2, 5, 32)


def test_forward_intermediates_gives_the_features_too():
    model = tiny().eval()
    x = images(64, 64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=[1, -1], norm=True, output_fmt="NHWC")
        early, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
        torch.testing.assert_close(final, model.forward_features(x))
    assert [out.shape for out in maps] == [(2, 8, 8, 8), (2, 2, 2, 32)]
    assert early.shape == (2, 16, 16, 8)


def test_features_only_prunes_what_it_does_not_need():
    model = timm.create_model("lvt", features_only=True, out_indices=(0, 2))
    assert model.feature_info.channels() == [64, 160]
    assert model.feature_info.reduction() == [4, 16]
    assert not any("stages.3" in name or "cls" in name or "head" in name for name in model.state_dict())
    assert [out.shape[1:] for out in model(images(40, 50))] == [(64, 10, 13), (160, 3, 4)]


def test_recursion_depth_and_atrous_rates():
    depths = [tiny(recursion_depth=depth).eval() for depth in (1, 2, 3)]
    rates = tiny(atrous_rates=(1,)).eval()
    x = images(64, 64)
    with torch.no_grad():
        outputs = [model(x) for model in (*depths, rates)]
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other) for other in outputs[:i])
    attention = depths[2].stages[1].blocks[0].attn
    x = torch.randn(1, 8, 8, 8)
    first = torch.nn.functional.silu(attention._attention(x))
    second = torch.nn.functional.silu(attention._attention(first + x))
    torch.testing.assert_close(attention(x), torch.nn.functional.silu(attention._attention(second + first)))


def test_grad_checkpointing_changes_no_gradient():
    model = tiny()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = images(64, 64)
    for each in (model, other):
        each(x).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_drop_path_weight_decay_and_layer_decay():
    model = tiny(drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    _, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert {id(p) for p in decayed["params"]} == {
        id(p) for name, p in model.named_parameters() if p.dim() > 1 and name != "cls_token"
    }
    scale = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scale |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    by_name = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    order = ["stages.0.patch_embed.proj.weight", "stages.0.blocks.0.attn.v"]
    order += ["stages.1.blocks.0.attn.q.weight", "stages.3.blocks.0.attn.q.weight", "cls_token"]
    order += ["class_blocks.0.attn.q.weight", "class_blocks.1.attn.q.weight", "head.weight"]
    scales = [by_name[name] for name in order]
    assert scales == sorted(set(scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(dtype):
    model = tiny().eval()
    x = images(64, 64)
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
        (lambda: tiny(global_pool="map"), "global_pool must be one of 'token', 'avg', 'max', ''"),
        (lambda: tiny(num_heads=(3, 2, 2, 4)), r"num_heads \(3, 2, 2, 4\) and class_heads 4 must divide dims"),
        (lambda: tiny(recursion_depth=0), "recursion_depth and atrous_rates must be 1 or more, got 0"),
        (lambda: tiny()(images(31, 64)), "32 pixels or more"),
        (lambda: tiny(depths=(1, 1)), "depths must fit the 4 stages"),
        (lambda: tiny(reductions=(4, 2)), "reductions must fit the 4 stages"),
        (
            lambda: tiny()(images(64, 96), torch.zeros(2, 2, dtype=torch.bool)),
            r"mix_mask must be \(2, 3\) for images of \(64, 96\), got \(2, 2\)",
        ),
    ],
)
def test_wrong_input_is_one_line(act, message):
    with pytest.raises(InputError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_pretrained_cfg():
    for name in ("lvt", "lvt_cls"):
        cfg = timm.create_model(name).pretrained_cfg
        assert (cfg["crop_pct"], cfg["interpolation"]) == (0.96, "bicubic")
        assert cfg["classifier"] == ("head", "aux_head")
