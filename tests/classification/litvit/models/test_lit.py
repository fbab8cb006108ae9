"""LIT beside its published outputs, and as a timm model."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import litvit  # noqa: F401 (registers the models)
from litvit.attention.position_tables import resize_relative_table
from litvit.benchmarks.macs import count_macs
from litvit.errors import InputError
from litvit.models import LIT

PUBLISHED = {  # parameters, multiply-adds in 10^9
    "lit_ti": (19_886_272, 3.6),
    "lit_s": (27_973_720, 4.1),
    "lit_m": (49_372_264, 8.6),
    "lit_b": (87_292_384, 15.0),
}
TOKEN = {"position": "absolute", "class_token": True, "global_pool": "token"}


# Choices per stage that lead from LIT to PVT and the paper's ablations.
PVT = {**TOKEN, "num_heads": (1, 1, 2, 4), "sr_ratios": (8, 4, 2, 1), "merging": "conv"}
PLAIN = {"merging": "linear"}


def tiny(**kwargs):
    torch.manual_seed(0)
    config = {"img_size": 64, "num_classes": 5, "dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1)}
    model = LIT(**{**config, "num_heads": (0, 0, 2, 4), **kwargs})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "pvt_small"])
def test_published_outputs(name, published, golden):
    model = timm.create_model(name).eval()
    assert model.load_state_dict(published(name)) == ([], [])
    expected, offsets = golden(name), []
    for stage in model.stages[1:]:
        if name != "pvt_small":
            stage.downsample.offset.register_forward_hook(lambda module, args, output: offsets.append(output))
    # The goldens' input: two images of numpy's standard normal numbers, seed 0.
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        actual = {"logits": model(x)} | {f"offset{i}": offset for i, offset in enumerate(offsets)}
    assert len(expected) == (4 if name == "lit_ti" else 1)
    for key, value in expected.items():
        assert (actual[key] - value).norm() < 1e-5 * value.norm(), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_multiply_adds(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters, macs = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert abs(count_macs(model) / 1e9 / macs - 1) < 0.01


@pytest.mark.parametrize("kwargs", [{}, TOKEN, PVT, PLAIN])
def test_training_and_evaluation_attend_alike(kwargs):
    model = tiny(**kwargs).eval()
    x = images(64, 64)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, TOKEN, PVT, PLAIN])
@pytest.mark.parametrize("size", [(32, 32), (33, 97), (70, 50), (128, 64)])
def test_dense_maps_have_their_strides_at_any_size(kwargs, size):
    model = tiny(**kwargs).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(images(*size), intermediates_only=True)
    for i, out in enumerate(maps):
        stride = 4 * 2**i
        assert out.shape == (2, model.feature_info[i]["num_chs"], -(-size[0] // stride), -(-size[1] // stride))


def test_reduced_attention_is_attention_to_the_reduced_map():
    """Attention over all tokens of the reduced map, in float64; what an odd map lacks is zeros."""
    attention, x = tiny(**PVT).double().stages[1].blocks[0].attn, images(6, 7).double()
    x = F.conv2d(x, torch.randn(16, 3, 1, 1, dtype=torch.float64)).flatten(2).transpose(1, 2)
    maps = F.pad(x.transpose(1, 2).unflatten(2, (6, 7)), (0, 1, 0, 2))
    reduced = F.conv2d(maps, attention.sr.weight, attention.sr.bias, stride=4).flatten(2).transpose(1, 2)
    k, v = attention.kv(attention.norm(reduced)).chunk(2, -1)
    weights = (attention.q(x) @ k.transpose(1, 2) / 4).softmax(-1)  # one head of 16 channels
    torch.testing.assert_close(attention(x, (6, 7)), attention.proj(weights @ v))


def test_what_tells_the_ablations_apart():
    """Table 2: merging. Table 3: DTM in PVT. Table 4: attention over all tokens, and none in some stages."""
    models = {}
    for name in timm.list_models(["lit_*", "pvt_small*"]):
        with torch.device("meta"):
            models[name] = timm.create_model(name)
    kinds = {name: [type(s.blocks[0].attn).__name__ for s in model.stages] for name, model in models.items()}
    full, none = "Attention", "NoneType"
    assert kinds["pvt_small"] == kinds["pvt_small_dtm"] == ["SpatialReductionAttention"] * 4
    assert kinds["lit_ti"] == kinds["lit_ti_plain"] == kinds["lit_s_plain"] == [none, none, full, full]
    for name, removed in (("", 0), ("_no1", 1), ("_no12", 2), ("_no123", 3), ("_no1234", 4)):
        assert kinds[f"pvt_small_msa{name}"] == [none] * removed + [full] * (4 - removed)
    merging = {name: {type(stage.downsample).__name__ for stage in m.stages[1:]} for name, m in models.items()}
    assert merging["pvt_small_dtm"] == merging["lit_s"] == {"DeformableTokenMerging"}
    assert merging["lit_s_plain"] == {"PatchMerging"}
    assert merging["lit_ti_plain"] == merging["pvt_small"] == merging["pvt_small_msa_no1"] == {"ConvMerging"}


def test_without_any_attention_the_classifier_sees_the_image():
    model = timm.create_model("pvt_small_msa_no1234", img_size=64, num_classes=5, dims=(8, 16, 32, 64)).eval()
    first, second = model(images(64, 64))
    assert not torch.allclose(first, second, rtol=1e-6, atol=1e-6)


def test_dense_padding_is_the_same_as_zeros_around():
    model = tiny().eval()
    x = images(62, 61)
    with torch.no_grad():
        ours = model.forward_intermediates(x, intermediates_only=True)[0]
        padded = model.forward_intermediates(F.pad(x, (0, 3, 0, 2)), intermediates_only=True)[0]
    torch.testing.assert_close(ours, padded)


def test_dense_position_tables_are_resized():
    model = tiny(**TOKEN).eval()
    stage = model.stages[0]
    stage.blocks = torch.nn.ModuleList()
    x = images(96, 64)
    with torch.no_grad():
        ours = model.forward_intermediates(x, [0], intermediates_only=True)[0]
        table = F.interpolate(stage.pos_embed.permute(0, 3, 1, 2), size=(24, 16), mode="bilinear")
        expected = model.patch_embed(x).permute(0, 3, 1, 2) + table
        table = tiny().stages[2].blocks[0].attn.relative_position_bias_table
        wide = F.interpolate(table[None], size=(11, 7), mode="bicubic")[0]
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(resize_relative_table(table, (6, 4)), wide)


@pytest.mark.parametrize("kwargs", [{}, TOKEN])
def test_forward_intermediates_gives_the_features_too(kwargs):
    model = tiny(**kwargs).eval()
    x = images(64, 64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=[1, -1], norm=True, output_fmt="NHWC")
        expected = model.forward_features(x)
        early, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close(final, expected)
    assert [out.shape for out in maps] == [(2, 8, 8, 16), (2, 2, 2, 64)]
    assert early.shape == (2, 16, 16, 8)
    if not kwargs:
        torch.testing.assert_close(maps[1], expected)


def test_out_norms_apply_to_outputs_only():
    model, plain = tiny(out_norms=(1, 3)).eval(), tiny().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("out_norms")})
    x = images(64, 64)
    with torch.no_grad():
        normed = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        raw = plain.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    for i in range(4):
        expected = F.layer_norm(raw[i], raw[i].shape[-1:]) if i in (1, 3) else raw[i]
        torch.testing.assert_close(normed[i], expected)


def test_features_only_prunes_what_it_does_not_need():
    model = timm.create_model("lit_ti", features_only=True, out_indices=(0, 2), img_size=32)
    assert model.feature_info.channels() == [64, 320]
    assert model.feature_info.reduction() == [4, 16]
    assert not any(name.startswith(("model.stages.3", "model.cls", "model.head")) for name in model.state_dict())
    assert [out.shape[1:] for out in model(images(40, 50))] == [(64, 10, 13), (320, 3, 4)]


def test_classifier_and_pooling():
    model = tiny(**TOKEN)
    assert model.get_classifier().out_features == 5
    x = images(64, 64)
    tokens = model.eval().forward_features(x)
    assert tokens.shape == (2, 5, 64)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(7, "avg")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    assert tiny(num_classes=0, global_pool="")(x).shape == (2, 2, 2, 64)


def test_drop_path_rises_to_its_rate():
    model = tiny(drop_path_rate=0.4, drop_rate=0.1)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert model.head_drop.p == 0.1


def test_grad_checkpointing_changes_no_gradient():
    model = tiny()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = images(64, 64)
    for each in (model, other):
        each(x).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_weight_decay_and_layer_decay_groups():
    assert tiny(**TOKEN).no_weight_decay() == {"cls_token"}
    model = tiny()
    assert len(model.no_weight_decay()) == 3
    plain = {
        id(p) for p in param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())[0]["params"]
    }
    for name, parameter in model.named_parameters():
        undecayed = parameter.dim() == 1 or name in model.no_weight_decay()
        assert (id(parameter) in plain) == undecayed, name
    for kwargs in ({}, TOKEN):
        model = tiny(**kwargs)
        scale = {}
        for group in param_groups_layer_decay(model, layer_decay=0.5):
            scale |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
        by_name = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
        order = ["patch_embed.proj.weight", "stages.0.blocks.0.mlp.fc1.weight", "stages.1.downsample.conv.weight"]
        order += [f"stages.2.blocks.{i}.attn.qkv.weight" for i in range(2)]
        order += ["stages.3.blocks.0.attn.qkv.weight", "head.weight"]
        scales = [by_name[name] for name in order]
        assert scales == sorted(set(scales))
        if kwargs:
            assert by_name["cls_token"] == by_name["cls_pos_embed"] == by_name["stages.3.downsample.conv.weight"]


@pytest.mark.parametrize("kwargs", [{}, TOKEN])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(kwargs, dtype):
    model = tiny(**kwargs).eval()
    for stage in model.stages[1:]:
        # Offsets of a pixel or so; large ones would turn rounding into other tokens.
        torch.nn.init.normal_(stage.downsample.offset.weight, std=0.01)
        torch.nn.init.normal_(stage.downsample.offset.bias)
    x = images(64, 64)
    expected = copy.deepcopy(model).double()(x.double())
    assert (model(x) - expected).norm() < 1e-5 * expected.norm()
    with torch.autocast("cpu", dtype):
        mixed = model(x)
    mixed.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (mixed - expected).norm() < 32 * torch.finfo(dtype).eps * expected.norm()
    maps = tiny(**kwargs).to(dtype).eval().forward_intermediates(images(70, 40).to(dtype), intermediates_only=True)
    assert all(out.dtype == dtype for out in maps)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: tiny(img_size=100), "multiple of 32"),
        (lambda: tiny(img_size=0), "multiple of 32"),
        (lambda: tiny(global_pool="token"), "global_pool must be one of 'avg', 'max', ''"),
        (lambda: tiny(out_norms=(4,)), "out_norms must be stages from 0 to 3"),
        (lambda: tiny(merging="max"), "merging must be one of 'dtm', 'conv', 'linear', got 'max'"),
        (lambda: tiny(**TOKEN, sr_ratios=(8, 4)), "sr_ratios must be a number from 0 for each stage"),
        (lambda: tiny(**TOKEN, sr_ratios=(8, 4, 2, -1)), "sr_ratios must be a number from 0 for each stage"),
        (lambda: tiny(**TOKEN, sr_ratios=(8, 4, 2, 2)), "sr_ratios must be 0 or 1 in the stage of the class token"),
        (lambda: tiny(sr_ratios=(8, 4, 2, 1)), "need position='absolute'"),
        (lambda: tiny()(images(64, 96)), r"got 64 x 96: resize them, or build it with img_size=\(64, 96\)"),
        (lambda: tiny().forward_intermediates(images(31, 64)), "32 pixels or more"),
        (lambda: tiny().forward_intermediates(images(64, 64), output_fmt="NLC"), "output_fmt must be"),
    ],
)
def test_wrong_input_is_one_line(act, message):
    with pytest.raises(InputError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_pretrained_cfg():
    cfg = timm.create_model("lit_ti", img_size=32).pretrained_cfg
    assert cfg["interpolation"] == "bicubic"
    assert cfg["crop_pct"] == 0.875
    assert cfg["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert cfg["std"] == timm.data.IMAGENET_DEFAULT_STD


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{}, TOKEN])
def test_dense_training_in_deterministic_mode_repeats_itself(kwargs):
    model, x = tiny(**kwargs).cuda(), images(70, 101).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(2):
            model.zero_grad()
            maps = model.forward_intermediates(x, intermediates_only=True)
            sum(out.square().sum() for out in maps).backward()
            gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
