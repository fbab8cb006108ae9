"""Attention with a relative position bias beside its definition in float64."""

import pytest
import torch

from litvit.attention import relative_attention, relative_position_bias
from litvit.errors import InputError


def _tensors(grid, heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    h, w = grid
    shapes = (2, h * w, 3, heads, 8), (heads, 2 * h - 1, 2 * w - 1)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def _defined(qkv, table, grid):
    """A score at a time."""
    h, w = grid
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    places = [(y, x) for y in range(h) for x in range(w)]
    out = []
    for i, (yi, xi) in enumerate(places):
        scores = [
            (q[:, :, i] * k[:, :, j]).sum(-1) / q.shape[-1] ** 0.5 + table[:, yi - yj + h - 1, xi - xj + w - 1]
            for j, (yj, xj) in enumerate(places)
        ]
        weights = torch.stack(scores, dim=-1).softmax(-1)
        out.append((weights.unsqueeze(-1) * v).sum(-2))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("path", [None, "plain", "sdpa"])
@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (4, 1), (1, 1)])
def test_equals_the_definition_with_gradients(grid, path):
    tensors = _tensors(grid)
    ours, reference = relative_attention(*tensors, grid, path), _defined(*tensors, grid)
    torch.testing.assert_close(ours, reference)
    gradient = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, tensors, gradient), torch.autograd.grad(reference, tensors, gradient), strict=True
    ):
        torch.testing.assert_close(mine, other)
    with torch.no_grad():
        torch.testing.assert_close(relative_attention(*tensors, grid, path), reference)


def test_bias_is_the_table_of_differences():
    grid = h, w = 3, 4
    table = torch.arange(2 * 5 * 7.0).view(2, 5, 7)
    bias = relative_position_bias(table, grid)
    assert bias.shape == (1, 2, 12, 12)
    for i in range(12):
        for j in range(12):
            difference = i // w - j // w + h - 1, i % w - j % w + w - 1
            assert (bias[0, :, i, j] == table[:, difference[0], difference[1]]).all()


@pytest.mark.parametrize("path", ["plain", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_with_a_table_of_more(dtype, path):
    qkv, table = (x.detach() for x in _tensors((3, 4)))
    qkv = qkv.to(dtype)
    expected = _defined(qkv.double(), table, (3, 4))
    out = relative_attention(qkv, table.float().requires_grad_(), (3, 4), path)
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


def test_compiles_without_graph_breaks_at_any_size():
    compiled = torch.compile(relative_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in [(3, 4), (5, 2)]:
        tensors = _tensors(grid)
        outs = compiled(*tensors, grid), relative_attention(*tensors, grid)
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), tensors) for out in outs))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors, grid), relative_attention(*tensors, grid))


def test_the_environment_names_the_path(monkeypatch):
    tensors = _tensors((2, 3))
    monkeypatch.setenv("LIT_ATTENTION", "quick")
    with pytest.raises(InputError, match="must be one of plain, sdpa, triton, got 'quick'"):
        relative_attention(*tensors, (2, 3))
    torch.testing.assert_close(relative_attention(*tensors, (2, 3), "plain"), _defined(*tensors, (2, 3)))


def test_kernels_refuse_what_they_cannot_take(monkeypatch):
    monkeypatch.setenv("LIT_ATTENTION", "triton")
    for dtype in (torch.float64, torch.float32):  # heads of 8 channels too
        with pytest.raises(InputError, match=f"compute capability 8.0.* got {dtype} on cpu with 8"):
            relative_attention(*_tensors((2, 3), dtype=dtype), (2, 3))


@pytest.mark.parametrize(
    ("changed", "shape", "message"),
    [
        (0, (2, 5, 3, 2, 8), r"qkv must be \(B, 2 \* 3, 3, heads, d\), got \(2, 5, 3, 2, 8\)"),
        (0, (2, 6, 48), "qkv must be"),
        (1, (2, 5, 3), "table must be"),
    ],
)
def test_shapes_that_do_not_fit(changed, shape, message):
    tensors = _tensors((2, 3))
    tensors[changed] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        relative_attention(*tensors, (2, 3))
