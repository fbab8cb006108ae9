"""HiLo beside its published arithmetic, in float64."""

import copy

import pytest
import torch

from litvit.attention import HiLo
from litvit.benchmarks.published_litv2 import HiLo as PublishedHiLo
from litvit.errors import InputError


def pair(dim=24, heads=6, window=2, alpha=0.9):
    """The published arithmetic and ours, with the same weights."""
    torch.manual_seed(0)
    theirs, ours = PublishedHiLo(dim, heads, window, alpha).double(), HiLo(dim, heads, window, alpha).double()
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    return theirs, ours


def tokens(*size, dim=24, batch=2, **kwargs):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *size, dim, dtype=torch.float64, generator=generator, **kwargs)


def published(theirs, x):
    return theirs(x.flatten(1, 2), x.shape[1:3]).view_as(x)


@pytest.mark.parametrize("alpha", [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 7])
def test_the_published_arithmetic(window, alpha):
    theirs, ours = pair(window=window, alpha=alpha)
    for size in ((12, 12), (7, 5), (1, 9), (13, 14), (1, 1)):
        x = tokens(*size)
        torch.testing.assert_close(ours(x), published(theirs, x))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), published(theirs, x))


@pytest.mark.parametrize(
    ("window", "alpha", "names"),
    [
        (2, 0, {"h_qkv", "h_proj"}),
        (2, 0.1, {"h_qkv", "h_proj"}),  # int(6 * 0.1) is no head
        (2, 0.5, {"l_q", "l_kv", "l_proj", "h_qkv", "h_proj"}),
        (2, 1, {"l_q", "l_kv", "l_proj"}),
        (1, 0, {"l_q", "l_kv", "l_proj"}),
    ],
)
def test_published_names(window, alpha, names):
    ours = HiLo(24, 6, window, alpha)
    assert {name.partition(".")[0] for name in ours.state_dict()} == names


@pytest.mark.parametrize(
    ("heads", "alpha", "low"),
    [(12, 0.9, 10), (16, 0.9, 14), (10, 0.7, 7), (100, 0.29, 28), (10, 0.99, 9), (3, 1 / 3, 1)],  # 100 * 0.29 < 29
)
def test_number_of_heads_is_rounded_down_as_published(heads, alpha, low):
    ours = HiLo(4 * heads, heads, 2, alpha)
    assert (ours.low_heads, ours.high_heads) == (low, heads - low)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_gradients_are_the_published_ones(window, alpha):
    pairs = []
    for model, run in zip(pair(window=window, alpha=alpha), (published, lambda ours, x: ours(x)), strict=True):
        x = tokens(7, 5, requires_grad=True)
        run(model, x).square().sum().backward()
        pairs.append({"x": x.grad} | {name: parameter.grad for name, parameter in model.named_parameters()})
    assert pairs[0].keys() == pairs[1].keys()
    for name, gradient in pairs[0].items():
        torch.testing.assert_close(pairs[1][name], gradient, msg=name)


def test_gradients_are_those_of_finite_differences():
    _, ours = pair(dim=4, heads=2, window=2, alpha=0.5)
    assert torch.autograd.gradcheck(ours, tokens(3, 2, dim=4, batch=1, requires_grad=True))


def test_padding_takes_part_and_is_cut_off():
    """A map that is padded by hand gives other outputs only where there is no padding to see."""
    _, ours = pair(window=2, alpha=0)
    x = tokens(3, 4)
    padded = torch.cat((x, torch.zeros_like(x[:, :1])), dim=1)
    torch.testing.assert_close(ours(x), ours(padded)[:, :3])
    torch.testing.assert_close(ours(x)[:, :2], ours(x[:, :2]))
    assert not torch.allclose(ours(x)[:, 2:], ours(x[:, 2:].repeat(1, 2, 1, 1))[:, :1])


def test_dropout():
    ours = HiLo(24, 6, attn_drop=0.5).double().eval()
    plain = copy.deepcopy(ours)
    plain.attn_drop.p = 0.0
    x = tokens(4, 6)
    torch.testing.assert_close(ours(x), plain(x))
    assert not torch.equal(ours.train()(x), ours(x))
    ours = HiLo(24, 6, proj_drop=0.5).double()
    assert 0.3 < (ours(x) == 0).double().mean() < 0.7


def test_transforms_of_torch_func_and_forward_derivatives():
    theirs, ours = pair(window=2, alpha=0.5)
    x = tokens(3, 4, batch=3)
    torch.testing.assert_close(torch.func.vmap(lambda one: ours(one[None])[0])(x), ours(x))
    _, forward = torch.func.jvp(ours, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: published(theirs, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(forward, expected)


def test_autocast_and_no_images():
    ours = HiLo(64, 4)
    x = tokens(5, 6, dim=64).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(x)
    expected = ours(x)
    assert (mixed - expected).norm() < 0.02 * expected.norm()
    assert ours(x[:0]).shape == (0, 5, 6, 64)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_one_graph_for_maps_of_all_sizes(window):
    _, ours = pair(window=window)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, backend=count, dynamic=True)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(ours, (tokens(8, 8),), dynamic_shapes={"x": sizes}).module()
    with torch.no_grad():
        for size in ((7, 10), (8, 12), (13, 9)):
            x = tokens(*size, batch=3)
            torch.testing.assert_close(compiled(x), ours(x))
            torch.testing.assert_close(exported(x), ours(x))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: HiLo(24, 5), "num_heads must be a whole number from 1 that divides dim, 24, got 5"),
        (lambda: HiLo(24, 0), "num_heads must be a whole number from 1 that divides dim, 24, got 0"),
        (lambda: HiLo(24, 6, window_size=0), "window_size must be a whole number from 1, got 0"),
        (lambda: HiLo(24, 6.0), "num_heads must be a whole number from 1 that divides dim, 24, got 6.0"),
        (lambda: HiLo(24, 6, window_size=(2, 2)), r"window_size must be a whole number from 1, got \(2, 2\)"),
        (lambda: HiLo(24, 6, alpha=(0, 1)), r"alpha must be a number from 0 to 1, got \(0, 1\)"),
        (lambda: HiLo(24, 6, window_size=2.5), "window_size must be a whole number from 1, got 2.5"),
        (lambda: HiLo(24, 6, alpha=1.1), "alpha must be a number from 0 to 1, got 1.1"),
        (lambda: HiLo(24, 6, alpha=float("nan")), "alpha must be a number from 0 to 1, got nan"),
        (lambda: HiLo(24, 6)(torch.zeros(2, 9, 24)), r"x must be tokens \(B, H, W, 24\), got shape \(2, 9, 24\)"),
        (lambda: HiLo(24, 6)(torch.zeros(2, 24, 3, 3)), r"x must be tokens \(B, H, W, 24\)"),
    ],
)
def test_wrong_arguments_are_one_line(act, message):
    with pytest.raises(InputError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)
