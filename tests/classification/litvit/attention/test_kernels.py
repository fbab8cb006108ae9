"""The kernels of attention beside the plain path in float64: on a GPU, else in Triton's interpreter."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litvit.attention import relative_attention
from litvit.models.lit import Attention

ROOT = Path(__file__).parents[4]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds it; a GPU's exponentials are less exact.
TOLERANCES = {torch.float32: 1e-5 if DEVICE == "cuda" else 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def on_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test where the kernels run: here on a GPU, else with this file's others in Triton's interpreter."""

    @functools.wraps(test)
    def run(**arguments: object) -> None:
        if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            test(**arguments)
        else:
            output = _in_the_interpreter()
            assert f"PASSED {os.environ['PYTEST_CURRENT_TEST'].removesuffix(' (call)')}\n" in output, output

    return pytest.mark.gpu(run) if DEVICE == "cuda" else run


@functools.cache
def _in_the_interpreter() -> str:
    """What pytest says of this file in a process that has Triton interpret kernels from its start."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", __file__],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def _tensors(grid, batch=1, heads=1, d=16, dtype=torch.float32):
    """Queries, keys and values of one projection, the table, and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    h, w = grid
    shapes = (batch, h * w, 3, heads, d), (heads, 2 * h - 1, 2 * w - 1), (batch, h * w, heads, d)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _run(tensors, grid, path="triton", attention=relative_attention):
    """The result, and the gradients of queries, keys and values together and of the table."""
    qkv, table, gradient = (x.detach() for x in tensors)
    qkv.requires_grad_()
    table.requires_grad_()
    out = attention(qkv, table, grid, path)
    return [out.detach(), *torch.autograd.grad(out, (qkv, table), gradient.to(out.dtype))]


def _assert_near(ours, reference, tolerance):
    for mine, other in zip(ours, reference, strict=True):
        error = (mine.cpu().double() - other.cpu()).norm() / other.norm()
        assert error < tolerance, error


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        ((5, 7), {"batch": 2, "heads": 3}),
        ((1, 9), {"d": 64}),
        ((13, 6), {}),  # two tiles, the second not full
        ((6, 11), {}),  # the table's gradient takes three rows together
        ((5, 66), {}),  # and here a row, of two tiles
        ((2, 3), {"batch": 17}),  # whose table's gradient is shared out, by 9 and 8 images
    ],
)
@on_kernels
def test_float32_with_gradients(grid, sizes):
    tensors = _tensors(grid, **sizes)
    reference = _run([x.double() for x in tensors], grid, "plain")
    _assert_near(_run([x.to(DEVICE) for x in tensors], grid), reference, TOLERANCES[torch.float32])


@pytest.mark.parametrize("table_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_kernels
def test_half_precision_with_gradients(dtype, table_dtype):
    tensors = _tensors((9, 1), heads=2, d=32, dtype=dtype)
    reference = _run([x.double() for x in tensors], (9, 1), "plain")
    tensors[1] = tensors[1].to(table_dtype or dtype)
    ours = _run([x.to(DEVICE) for x in tensors], (9, 1))
    assert [x.dtype for x in ours] == [dtype, dtype, tensors[1].dtype]
    _assert_near(ours, reference, TOLERANCES[dtype])


@on_kernels
def test_no_images():
    out, *gradients = _run([x.to(DEVICE) for x in _tensors((3, 4), batch=0, heads=2)], (3, 4))
    assert out.shape == (0, 12, 2, 16)
    assert not any(gradient.any() for gradient in gradients)


@on_kernels
def test_large_scores_in_any_memory_layout():
    # Scores of some hundreds, of which exponentials overflow, far below zero where there are no keys to be seen.
    generator = torch.Generator().manual_seed(0)
    qkv, gradient = torch.randn(1, 15, 3, 2, 16, generator=generator), torch.randn(1, 15, 2, 16, generator=generator)
    qkv[:, :, 0] *= 10
    table = 100 * torch.randn(2, 5, 9, generator=generator) - 300
    for x in (qkv, qkv.transpose(1, 4).contiguous().transpose(1, 4)):
        leaves = [y.to(DEVICE).requires_grad_() for y in (x, table)]
        doubles = [y.detach().cpu().double().requires_grad_() for y in leaves]
        out = relative_attention(*leaves, (3, 5), path="triton")
        reference = relative_attention(*doubles, (3, 5), path="plain")
        _assert_near([out], [reference], 1e-4)
        # An expanded gradient has no strides.
        _assert_near(torch.autograd.grad(out.sum(), leaves[0]), torch.autograd.grad(reference.sum(), doubles[0]), 1e-4)
        ours = torch.autograd.grad(relative_attention(*leaves, (3, 5), "triton"), leaves, gradient.to(DEVICE))
        reference = torch.autograd.grad(relative_attention(*doubles, (3, 5), "plain"), doubles, gradient.double())
        _assert_near(ours, reference, 1e-4)


@on_kernels
def test_autocast():
    tensors = _tensors((2, 5), heads=2)
    reference = _run([x.double() for x in tensors], (2, 5), "plain")
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = _run([x.to(DEVICE) for x in tensors], (2, 5))
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.float32, torch.float32]
    _assert_near(ours, reference, TOLERANCES[torch.bfloat16])


@on_kernels
def test_torch_compile_sees_one_op():
    from litvit.attention import kernels

    tensors = [x.to(DEVICE) for x in _tensors((2, 5), heads=2)]
    compiled = torch.compile(relative_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((2, 5), (4, 3)):
        tensors = [x.to(DEVICE) for x in _tensors(grid, heads=2)]
        for mine, other in zip(_run(tensors, grid, attention=compiled), _run(tensors, grid), strict=True):
            torch.testing.assert_close(mine, other)
    qkv, table, _ = (x.requires_grad_() for x in tensors)
    torch.library.opcheck(kernels.relative_attention, (qkv, table, 3))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("grid", [(14, 14), (25, 42), (50, 33)])
def test_a_gpu_gives_the_float64_result_by_any_path(grid, dtype, tolerance):
    tensors = _tensors(grid, batch=2, heads=2, d=32, dtype=dtype)
    reference = _run([x.double() for x in tensors], grid, "plain")
    for path in ("triton", "sdpa", "plain", None):
        _assert_near(_run([x.cuda() for x in tensors], grid, path), reference, tolerance)


@pytest.mark.gpu
def test_a_gpu_repeats_its_numbers_and_waits_for_nothing():
    tensors = [x.cuda() for x in _tensors((40, 30), batch=2, heads=2, d=32, dtype=torch.bfloat16)]
    first = _run(tensors, (40, 30), None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = _run(tensors, (40, 30), None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_gpu_never_writes_the_bias_of_a_large_map():
    h, w = 100, 84
    tensors = [x.cuda() for x in _tensors((h, w), heads=2, d=32, dtype=torch.bfloat16)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _run(tensors, (h, w), None)
    bias = 2 * (h * w) ** 2 * tensors[0].element_size()
    assert torch.cuda.max_memory_allocated() - before < bias / 4


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_gpu_compiles_a_training_step_without_graph_breaks(dynamic):
    attention = Attention(64, 2, (14, 14)).cuda()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic)
    for grid in ((20, 30), (31, 17)):
        x = torch.randn(2, grid[0] * grid[1], 64, device="cuda")
        results = []
        for module in (attention, compiled):
            attention.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                out = module(x, grid)
            out.float().square().sum().backward()
            results.append([out.float(), *(parameter.grad for parameter in attention.parameters())])
        for mine, other in zip(*results, strict=True):
            assert (mine - other).norm() < 2e-2 * other.norm()
