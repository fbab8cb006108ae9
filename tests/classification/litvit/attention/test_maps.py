import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litvit.attention.maps import AttentionAverages, AttentionReader
from litvit.errors import InputError

LIT = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (0, 0, 2, 4), "num_classes": 3}
LVT = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "class_heads": 2, "num_classes": 3}


def create(name: str, **kwargs) -> nn.Module:
    """A model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for key, parameter in model.named_parameters():
        if any(part in key for part in (".qkv.", ".q.", ".kv.", ".h_qkv.", ".l_q.", ".l_kv.", "bias_table")):
            nn.init.normal_(parameter, std=0.7)
    return model


def mean_distance(p: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """Of probabilities (B, heads, n, m) from positions (n, 2) to (m, 2), those of class tokens missing: (heads,)."""
    p = p / p.sum(-1, keepdim=True)
    away = (at[:, None] - to[None]).square().sum(-1).sqrt()
    return (p * away).sum(-1).mean((0, 2))


def mean_entropy(p: Tensor) -> Tensor:
    p = p / p.sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1).mean((0, 2))


def centres(h: int, w: int, stride: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return stride * (torch.stack((y, x), -1).flatten(0, 1).double() + 0.5)


def inputs_of(model: nn.Module, images: Tensor, *names: str) -> dict[str, list[Tensor]]:
    """The inputs of modules, of every call."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: found[name].append(x[0].double()))
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def of_qkv(x: Tensor, qkv: nn.Linear, heads: int) -> Tensor:
    """The probabilities of plain attention, in float64."""
    bias = None if qkv.bias is None else qkv.bias.double()
    q, k, _ = F.linear(x, qkv.weight.double(), bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def places(averages: AttentionAverages) -> list[tuple[int, int, int]]:
    return [(found.stage, found.block, found.pass_number) for found in averages.maps]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def check(found, p: Tensor, at: Tensor, to: Tensor) -> None:
    """Compare averages with probabilities (B, heads, n, m) of a map's tokens."""
    torch.testing.assert_close(found.probabilities.flatten(1), p[:, :, found.query].mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.distance, mean_distance(p, at, to), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.entropy, mean_entropy(p), rtol=1e-4, atol=1e-4)


def test_plain_attention_with_a_class_token(images):
    model = create("lit_ti", img_size=(64, 96), **LIT)
    averages = AttentionAverages(model, (3, 64, 96), queries=(7, 4))
    for batch in images.split(2):
        averages.add(batch)
    assert [(found.stage, found.block, found.pass_number) for found in averages.maps] == [
        (3, 0, 1),
        (3, 1, 1),
        (4, 0, 1),
    ]
    assert [found.images for found in averages.maps] == [5, 5, 5]
    assert averages.left_out == []

    names = [f"stages.{place}.attn" for place in ("2.blocks.0", "2.blocks.1", "3.blocks.0")]
    inputs = inputs_of(model, images, *names)
    for found, name, heads, stride in zip(averages.maps, names, (2, 2, 4), (16, 16, 32), strict=True):
        p = of_qkv(inputs[name][0], model.get_submodule(name).qkv, heads)
        own = centres(64 // stride, 96 // stride, stride)
        p = p[..., -len(own) :, -len(own) :]  # without the class token of stage 4
        assert found.entropy.max() < 0.9 * math.log(len(own))
        check(found, p, own, own)


def test_a_relative_position_bias(images):
    model = create("lit_s", img_size=(64, 96), **LIT)
    with_bias = AttentionAverages(model, (3, 64, 96))
    with_bias.add(images)
    for stage in model.stages[2:]:
        for block in stage.blocks:
            table = block.attn.relative_position_bias_table
            nn.init.zeros_(table)
            table.data[:, table.shape[1] // 2, table.shape[2] // 2] = 1000.0
    averages = AttentionAverages(model, (3, 64, 96))
    averages.add(images)
    for found, other in zip(averages.maps, with_bias.maps, strict=True):  # each token looks at itself alone
        torch.testing.assert_close(found.distance, torch.zeros_like(found.distance))
        torch.testing.assert_close(found.entropy, torch.zeros_like(found.entropy))
        place = divmod(found.query, found.layout.grid[1])
        torch.testing.assert_close(found.probabilities[:, place[0], place[1]], torch.ones_like(found.distance))
        assert other.distance.min() > 1


@pytest.mark.parametrize("window", [2, 3])
def test_windows_and_means_of_hilo(images, window):
    config = {**LIT, "depths": (1, 1, 1, 1), "num_heads": (0, 0, 4, 4), "window_sizes": (0, 0, window, 1)}
    model = create("litv2_s", **config, alpha=0.5)
    averages = AttentionAverages(model, (3, 64, 96))
    averages.add(images)
    assert averages.left_out == []
    assert places(averages) == [(3, 0, 1), (3, 0, 2), (4, 0, 1)]
    high, low, all_tokens = averages.maps
    assert [len(found.distance) for found in averages.maps] == [2, 2, 4]
    assert (low.layout.key_grid, low.layout.reduction) == ((2, 3) if window == 2 else (2, 2), window)
    assert all_tokens.layout.key_grid == (2, 3)

    attn, name = model.stages[2].blocks[0].attn, "stages.2.blocks.0.attn"
    x = inputs_of(model, images, name)[name][0]
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % window, 0, -x.shape[1] % window))
    means = F.avg_pool2d(padded.permute(0, 3, 1, 2), window).flatten(2).transpose(1, 2)
    q = F.linear(x.flatten(1, 2), attn.l_q.weight.double(), attn.l_q.bias.double()).unflatten(2, (2, 4))
    k = F.linear(means, attn.l_kv.weight.double(), attn.l_kv.bias.double()).unflatten(2, (2, 2, 4))[:, :, 0]
    p = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 2).softmax(-1)
    check(low, p, centres(4, 6, 16), centres(*low.layout.key_grid, 16 * window))

    row, column = divmod(high.query, 6)
    top, left = row // window * window, column // window * window
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[top : top + window, left : left + window] = True
    assert (high.probabilities[:, ~inside] == 0).all()
    cut = padded[:, top : top + window, left : left + window].flatten(1, 2)
    p = of_qkv(cut, attn.h_qkv, 2)[:, :, (row - top) * window + column - left].mean(0)
    seen = F.pad(inside, (0, window, 0, window))[top : top + window, left : left + window].flatten()
    torch.testing.assert_close(high.probabilities[:, inside], p[:, seen], rtol=1e-4, atol=1e-6)


def test_both_passes_of_rasa_and_reduced_keys(images):
    model = create("lvt", **LVT)
    averages = AttentionAverages(model, (3, 64, 96))
    averages.add(images)
    assert [(found.stage, found.pass_number) for found in averages.maps] == [
        (2, 1),
        (2, 2),
        (3, 1),
        (3, 2),
        (4, 1),
        (4, 2),
    ]
    assert [found.layout.key_grid for found in averages.maps] == [(2, 3)] * 6
    assert averages.left_out[0] == "stages.0.blocks.0.attn"  # between the places of a patch

    attn = model.stages[1].blocks[0].attn
    x = inputs_of(model, images, "stages.1.blocks.0.attn")["stages.1.blocks.0.attn"][0].float()
    for found in averages.maps[:2]:
        with torch.no_grad():
            q = attn.q(x).permute(0, 3, 1, 2)
            q = sum(F.silu(F.conv2d(q, attn.atrous.weight, padding=r, dilation=r, groups=8)) for r in (1, 3, 5))
            keys = attn.norm(attn.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)
            k = attn.kv(keys).unflatten(-1, (2, 2, 4))[:, :, 0].transpose(1, 2).double()
            q = q.flatten(2).unflatten(1, (2, 4)).transpose(-1, -2).double()
            p = (q @ k.transpose(-1, -2) / 2).softmax(-1)
            check(found, p, centres(8, 12, 8), centres(2, 3, 32))
            x = x + F.silu(attn._attention(x))


def test_timms_vit(images):
    model = create("vit_tiny_patch16_224", img_size=(64, 96), depth=2, embed_dim=12, num_heads=3, num_classes=3)
    averages = AttentionAverages(model, (3, 64, 96))
    averages.add(images)
    assert [(found.stage, found.block, found.query) for found in averages.maps] == [(1, 0, 15), (1, 1, 15)]
    x = inputs_of(model, images, "blocks.1.attn")["blocks.1.attn"][0]
    p = of_qkv(x, model.blocks[1].attn.qkv, 3)[..., 1:, 1:]
    check(averages.maps[1], p, centres(4, 6, 16), centres(4, 6, 16))
    assert model.blocks[1].attn.fused_attn  # as it was


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_timms_swin(name):
    """With uniform attention in every window, the map of a token is its window, also a shifted one."""
    model = create(name, img_size=96, window_size=4, depths=(2, 2), embed_dim=12, num_heads=(2, 3), num_classes=3)
    for layer in model.layers:
        for block in layer.blocks:
            for parameter in block.attn.parameters():
                nn.init.zeros_(parameter)
    averages = AttentionAverages(model, (3, 96, 96), queries=(24 * 2 + 5, 0))
    averages.add(torch.randn(2, 3, 96, 96))
    first, shifted, _, corner = (found.probabilities for found in averages.maps)
    expected = torch.zeros(24, 24, dtype=torch.float64)
    expected[:4, 4:8] = 1 / 16
    torch.testing.assert_close(first, expected.expand(2, 24, 24), rtol=1e-5, atol=1e-8)
    expected = torch.zeros(24, 24, dtype=torch.float64)
    expected[2:6, 2:6] = 1 / 16
    torch.testing.assert_close(shifted, expected.expand(2, 24, 24), rtol=1e-5, atol=1e-8)
    expected = torch.zeros(12, 12, dtype=torch.float64)
    expected[:2, :2] = 1 / 4  # what is shifted in from the other side is masked
    torch.testing.assert_close(corner, expected.expand(3, 12, 12), rtol=1e-5, atol=1e-8)

    y = torch.arange(4.0)
    inside = (y[:, None] - y).abs()
    away = (inside[:, None, :, None].square() + inside[None, :, None].square()).sqrt().mean()
    torch.testing.assert_close(averages.maps[0].distance, torch.full((2,), 4 * away.item(), dtype=torch.float64))
    assert averages.maps[0].uniform_distance is None


def test_uniform_attention_has_a_closed_form():
    """Zero queries and keys: the mean distance of two tokens of the grid, and the logarithm of their number."""
    model = create("lit_ti", img_size=(64, 96), **LIT)
    for name, parameter in model.named_parameters():
        if ".qkv." in name:
            nn.init.zeros_(parameter)
    averages = AttentionAverages(model, (3, 64, 96))
    averages.add(torch.randn(3, 3, 64, 96))
    for found, (h, w, stride) in zip(averages.maps, [(4, 6, 16), (4, 6, 16), (2, 3, 32)], strict=True):
        y, x = np.arange(h), np.arange(w)
        rows, columns = np.subtract.outer(y, y) ** 2, np.subtract.outer(x, x) ** 2
        distance = stride * np.sqrt(rows[:, :, None, None] + columns).mean()
        assert found.distance.numpy() == pytest.approx(distance, rel=1e-5)
        assert found.entropy.numpy() == pytest.approx(math.log(h * w), rel=1e-5)
        assert found.uniform_distance == pytest.approx(distance, rel=1e-5)
        assert found.uniform_entropy == pytest.approx(math.log(h * w), rel=1e-5)
        share = 1 / (h * w + (found.stage == 4))  # the class token has its share, and is left out
        assert found.probabilities.numpy() == pytest.approx(share, rel=1e-5)


def test_the_published_queries():
    model = timm.create_model("pvt_v2_b0", num_classes=3).eval()
    queries = {found.stage: found.query for found in AttentionAverages(model, (3, 224, 224)).maps}
    assert queries == {1: 1260, 2: 294, 3: 92, 4: 17}


def test_large_maps_are_measured_in_parts(monkeypatch, images):
    model = create("lit_ti", img_size=(64, 96), **LIT)
    results = []
    for chunk in (1 << 20, 1):
        monkeypatch.setattr("litvit.attention.maps.CHUNK", chunk)
        averages = AttentionAverages(model, (3, 64, 96))
        averages.add(images)
        results.append([(found.distance, found.entropy) for found in averages.maps])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet10t", "cait_xxs24_224"])
def test_a_model_whose_attention_cannot_be_read(name):
    """None at all, or heads that are mixed after the softmax: no probabilities."""
    kwargs = {"embed_dim": 48, "depth": 2, "depth_token_only": 1} if name.startswith("cait") else {}
    model = create(name, num_classes=3, **kwargs)
    with pytest.raises(InputError, match="has no attention between tokens of a map"):
        AttentionAverages(model, (3, *model.pretrained_cfg["input_size"][1:]))


def test_broken_weights_are_named(images):
    model = create("lit_ti", img_size=(64, 96), **LIT)
    nn.init.constant_(model.stages[2].blocks[1].attn.qkv.bias, float("nan"))
    averages = AttentionAverages(model, (3, 64, 96))
    with pytest.raises(InputError, match="attention of stages.2.blocks.1.attn is not finite"):
        averages.add(images)


@pytest.mark.parametrize(
    ("queries", "message"),
    [((1,), "one token for each stage with attention, 3, 4: got 1"), ((1, 6), "stage 4 has 2 x 3 tokens, 0 to 5")],
)
def test_queries_that_do_not_fit(queries, message):
    model = create("lit_ti", img_size=(64, 96), **LIT)
    with pytest.raises(InputError, match=message):
        AttentionAverages(model, (3, 64, 96), queries)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("lit_ti", (64, 96), {**LIT, "img_size": (64, 96)}),
        ("lvt", (64, 96), LVT),
        ("litv2_s", (64, 96), {**LIT, "num_heads": (0, 0, 4, 4), "window_sizes": (0, 0, 3, 1), "alpha": 0.5}),
        ("vit_tiny_patch16_224", (64, 64), {"img_size": 64, "depth": 1, "num_classes": 3}),
        (
            "swin_tiny_patch4_window7_224",
            (64, 64),
            {"img_size": 64, "window_size": 3, "depths": (2, 2), "num_heads": (1, 2), "embed_dim": 8, "num_classes": 3},
        ),
    ],
)
def test_rows_of_all_tokens(name, size, kwargs):
    model = create(name, **kwargs)
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    reader = AttentionReader(model, (3, *size))
    found: dict[int, Tensor] = {}
    output = reader.read(images, lambda number, p: found.update({number: reader.attentions[number].rows(p, 3)}))
    with torch.no_grad():
        torch.testing.assert_close(output, model(images), rtol=1e-4, atol=1e-4)
    stages = {attention.stage: math.prod(attention.layout.grid) for attention in reader.attentions}
    for queries in ([0] * len(stages), [count - 1 for count in stages.values()], None):
        averages = AttentionAverages(model, (3, *size), queries)
        averages.add(images)
        assert list(found) == list(range(len(averages.maps)))
        for number, average in enumerate(averages.maps):
            rows, attention = found[number], reader.attentions[number]
            shape = (math.prod(attention.layout.grid), math.prod(attention.layout.key_grid))
            assert rows.shape == (3, attention.heads, *shape)
            mean = rows[:, :, average.query].double().mean(0)
            torch.testing.assert_close(mean, average.probabilities.flatten(1), rtol=1e-4, atol=1e-7)
            if not any(attention.layout.prefixes) and attention.layout.windows is None:
                torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), rtol=1e-4, atol=1e-4)
