"""Triton kernels of token merging beside the plain formulation in float64: on a GPU, else in Triton's interpreter."""

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import torch.nn.functional as F

from litvit.dtm import DeformableTokenMerging, deform_conv_tokens
from litvit.errors import InputError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CHECKS: dict[str, Callable[[], None]] = {}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[subprocess.Popen | None]:
    """A process of this file whose Triton interprets kernels: it takes names of checks and answers with tracebacks."""
    if DEVICE == "cuda":
        yield None
        return
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def on_kernels(check: Callable[[], None]) -> Callable[[subprocess.Popen | None], None]:
    """Make a check a test that runs where the kernels run: here on a GPU, else in the interpreter."""
    CHECKS[check.__name__] = check

    def test(interpreter: subprocess.Popen | None) -> None:
        if interpreter is None:
            check()
            return
        print(check.__name__, file=interpreter.stdin, flush=True)
        answer = interpreter.stdout.readline()
        assert answer == "null\n", json.loads(answer) if answer else "the interpreter is gone"

    return pytest.mark.gpu(test) if DEVICE == "cuda" else test


def _answer(names: Iterable[str]) -> None:
    for name in names:
        error = None
        try:
            CHECKS[name.strip()]()
        except Exception:
            error = traceback.format_exc()
        print(json.dumps(error), flush=True)


def _tensors(B=2, H=7, W=9, C=5, O=7, k=2, scale=1.0, dtype=torch.float32):  # noqa: E741, N803
    torch.manual_seed(0)
    tensors = (
        torch.randn(B, H, W, C),
        scale * torch.randn(B, H // k, W // k, 2 * k * k),
        torch.randn(O, C, k, k) / C**0.5,
        torch.randn(O),
    )
    return [tensor.to(dtype) for tensor in tensors]


def _run(tensors, gradient, **kwargs):
    """The result and its gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = deform_conv_tokens(*leaves, **kwargs)
    return [out, *torch.autograd.grad(out, leaves, gradient.to(out))]


def _assert_near(ours, reference, tolerance):
    for name, mine, other in zip(("out", "x", "offset", "weight", "bias"), ours, reference, strict=False):
        error = (mine.detach().cpu().double() - other.detach()).norm() / other.detach().norm().clamp(min=1e-30)
        assert error < tolerance, f"{name} is off by {error}"


def _compare(tensors, tolerance):
    torch.manual_seed(1)
    rounded = [tensor.double() for tensor in tensors]
    gradient = torch.randn_like(deform_conv_tokens(*rounded)).to(tensors[0].dtype)
    reference = _run(rounded, gradient)
    ours = _run([tensor.to(DEVICE) for tensor in tensors], gradient, triton=True)
    assert [t.dtype for t in ours] == [tensors[2].dtype, *(t.dtype for t in tensors)]
    _assert_near(ours, reference, tolerance)


@on_kernels
def test_values_and_gradients_at_odd_sizes():
    for dtype, tolerance in TOLERANCES.items():
        _compare(_tensors(dtype=dtype), tolerance)
        _compare(_tensors(dtype=dtype)[:3], tolerance)  # no bias
        _compare(_tensors(1, 6, 8, 40, 72, scale=3, dtype=dtype), tolerance)


@on_kernels
def test_values_and_gradients_at_the_models_channels():
    _compare(_tensors(1, 4, 6, 320, 512), TOLERANCES[torch.float32])
    _compare(_tensors(1, 4, 6, 96, 192, dtype=torch.bfloat16), TOLERANCES[torch.bfloat16])


@on_kernels
def test_values_and_gradients_of_other_kernel_sizes_and_of_narrow_maps():
    for sizes in ((1, 11, 9, 16, 8, 3, 30), (2, 5, 1, 3, 4, 1, 3), (1, 1, 1, 3, 4, 1, 1)):
        _compare(_tensors(*sizes), TOLERANCES[torch.float32])


@on_kernels
def test_values_and_gradients_far_outside_and_at_whole_positions():
    for scale in (100, 4, 0):
        tensors = _tensors(scale=scale)
        _compare([tensors[0], tensors[1].round(), *tensors[2:]], TOLERANCES[torch.float32])
    crowded = _tensors()
    crowded[1] = torch.full_like(crowded[1], 0.25) - torch.arange(3).view(3, 1, 1) * 2  # every row reads the first
    _compare(crowded, TOLERANCES[torch.float32])


@on_kernels
def test_huge_infinite_and_nan_offsets_are_safe():
    x, offset, weight, _ = (tensor.to(DEVICE) for tensor in _tensors(H=6, W=4))
    offset.zero_()
    offset[0, 0, 0] = float("nan")
    offset[0, 0, 1] = 1e30
    offset[0, 1, 0] = float("inf")
    offset[0, 1, 1] = -float("inf")
    gradient = torch.ones(2, 3, 2, 7)
    ours = _run((x, offset, weight), gradient, triton=True)
    plain = _run((x.cpu(), offset.cpu(), weight.cpu()), gradient, triton=False)
    assert ours[0][0, 0, 0].isnan().all()
    torch.testing.assert_close([tensor.cpu() for tensor in ours], plain, equal_nan=True)


@on_kernels
def test_autocast_takes_tokens_and_parameters_as_they_come():
    tensors = [tensor.to(DEVICE) for tensor in _tensors(C=16)]
    tensors[1] = tensors[1].bfloat16()
    tensors[0] = tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    reference = [tensor.cpu().double() for tensor in tensors]
    gradient = torch.randn(2, 3, 4, 7)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = _run(tensors, gradient, triton=True)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    _assert_near(ours, _run(reference, gradient), TOLERANCES[torch.bfloat16])


@on_kernels
def test_float32_stays_so_where_backward_alone_runs_under_autocast():
    from litvit.dtm.triton_kernels import deform_conv_backward

    x, offset, weight, _ = (tensor.to(DEVICE) for tensor in _tensors(C=16))
    arguments = torch.randn(2, 3, 4, 7, device=DEVICE), x, offset, weight.permute(0, 2, 3, 1).flatten(1), 2
    expected = deform_conv_backward(*arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = deform_conv_backward(*arguments)
    torch.testing.assert_close(ours, expected)


@on_kernels
def test_kernels_refuse_float64():
    with pytest.raises(InputError, match="takes float32, bfloat16 and float16, got torch.float64"):
        deform_conv_tokens(*(tensor.to(DEVICE) for tensor in _tensors(dtype=torch.float64)), triton=True)


@on_kernels
def test_no_images():
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in _tensors(B=0)]
    out = deform_conv_tokens(*leaves, triton=True)
    assert out.shape == (0, 3, 4, 7)
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


@on_kernels
def test_bfloat16_keeps_the_fraction_of_columns_above_256():
    x = torch.zeros(1, 2, 320, 1, dtype=torch.bfloat16, device=DEVICE)
    x[:, :, 301] = 8
    offset = torch.zeros(1, 1, 160, 8, dtype=torch.bfloat16, device=DEVICE)
    offset[..., 1] = 0.5
    weight = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16, device=DEVICE)
    weight[..., 0, 0] = 1
    out = deform_conv_tokens(x, offset, weight, triton=True)
    assert out[0, 0, 150, 0] == 4
    assert out.float().sum() == 4


@on_kernels
def test_operators_keep_torchs_contracts():
    from litvit.dtm.triton_kernels import deform_conv, deform_conv_backward

    x, offset, weight, bias = (tensor.to(DEVICE).requires_grad_() for tensor in _tensors())
    matrix = weight.detach().permute(0, 2, 3, 1).flatten(1).requires_grad_()
    torch.library.opcheck(deform_conv, (x, offset, matrix, bias, 2))
    torch.library.opcheck(deform_conv, (x, offset, matrix, None, 2))
    gradient = torch.randn(2, 3, 4, 7, device=DEVICE)
    torch.library.opcheck(deform_conv_backward, (gradient, x.detach(), offset.detach(), matrix.detach(), 2))


@on_kernels
def test_compiles_without_graph_breaks_at_any_size():
    kernels = functools.partial(deform_conv_tokens, triton=True)
    compiled = torch.compile(kernels, fullgraph=True, dynamic=True, backend="aot_eager")
    for H, W in ((8, 6), (5, 12)):
        leaves = [tensor.to(DEVICE).requires_grad_() for tensor in _tensors(H=H, W=W)]
        expected, out = kernels(*leaves), compiled(*leaves)
        torch.testing.assert_close(out, expected)
        gradients = torch.autograd.grad(out.sum(), leaves)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), leaves))


@pytest.mark.gpu
def test_a_gpu_takes_the_kernels_by_itself():
    leaves = [tensor.cuda().requires_grad_() for tensor in _tensors(C=16)]
    assert "deform_conv" in type(deform_conv_tokens(*leaves).grad_fn).__name__.lower()
    assert "deform_conv" not in type(deform_conv_tokens(*leaves, triton=False).grad_fn).__name__.lower()
    assert deform_conv_tokens(*(leaf.double() for leaf in leaves)).dtype == torch.float64


@pytest.mark.gpu
def test_deterministic_mode_repeats_itself():
    tensors = [tensor.cuda() for tensor in _tensors(8, 28, 28, 64, 64)]
    gradient = torch.randn(8, 14, 14, 64)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = _run(tensors, gradient), _run(tensors, gradient)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.gpu
def test_neither_forward_nor_backward_waits_for_the_gpu():
    tensors = [tensor.cuda() for tensor in _tensors(2, 8, 8, 32, 64, dtype=torch.bfloat16)]
    gradient = torch.randn(2, 4, 4, 64, device="cuda")
    _run(tensors, gradient)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(tensors, gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_replays_forward_and_backward(dtype):
    leaves = [tensor.cuda().requires_grad_() for tensor in _tensors(2, 8, 8, 32, 64, dtype=dtype)]
    gradient = torch.randn(2, 4, 4, 64, device="cuda", dtype=dtype)

    def step():
        out = deform_conv_tokens(*leaves)
        return [out, *torch.autograd.grad(out, leaves, gradient)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = step()
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
        leaves[1].copy_(torch.randn_like(leaves[1]))
    graph.replay()
    _assert_near(ours, _run([leaf.cpu().double() for leaf in leaves], gradient.cpu().double()), TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_module_compiles_whole_for_training_and_eval(mode):
    torch.manual_seed(0)
    merge = DeformableTokenMerging(32, 64).cuda()
    torch.nn.init.normal_(merge.offset.weight, std=0.1)
    compiled = torch.compile(merge, fullgraph=True, mode=mode)
    x = torch.randn(2, 8, 8, 32, device="cuda")
    for training in (True, False):
        merge.train(training)
        with torch.autocast("cuda", torch.bfloat16):
            for _ in range(3):  # graphs are recorded in the second
                torch.compiler.cudagraph_mark_step_begin()
                merge.zero_grad()
                out = compiled(x)
                out.float().sum().backward()
            gradient = merge.conv.weight.grad.clone()
            merge.zero_grad()
            expected = merge(x)
            expected.float().sum().backward()
        torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
        assert F.cosine_similarity(gradient.flatten(), merge.conv.weight.grad.flatten(), dim=0) > 0.99


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # 18 GB. Offsets of 0 make it a strided convolution.
    x = torch.zeros(1, 2050, 2050, 512, dtype=torch.bfloat16, device="cuda")
    x[:, -2:, -2:] = torch.randn(2, 2, 512)
    offset = torch.zeros(1, 1025, 1025, 8, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(8, 512, 2, 2, dtype=torch.bfloat16, device="cuda") / 32
    gradient = torch.zeros(1, 1025, 1025, 8, dtype=torch.bfloat16, device="cuda")
    gradient[:, -1, -1] = 1
    out, x_grad, _, weight_grad = _run((x, offset, weight), gradient)
    last = x[:, -2:, -2:].permute(0, 3, 1, 2).double().requires_grad_()
    wide = weight.double().requires_grad_()
    expected = F.conv2d(last, wide, stride=2)
    grads = torch.autograd.grad(expected.sum(), (last, wide))
    pairs = [(out[:, -1, -1], expected.flatten(1)), (x_grad[:, -2:, -2:].permute(0, 3, 1, 2), grads[0])]
    for ours, reference in [*pairs, (weight_grad, grads[1])]:
        torch.testing.assert_close(ours.double(), reference.detach(), rtol=2e-2, atol=2e-2)


if __name__ == "__main__":
    _answer(sys.stdin)
