"""Where Triton's kernels run; their machine code for GPUs that need not be here."""

import re
from collections.abc import Callable

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from litvit.attention import kernels as attention
from litvit.dtm import triton_kernels as dtm

GPUS = pytest.mark.parametrize(
    ("capability", "dtype"), [(80, torch.float16), (80, torch.float32), (90, torch.bfloat16), (90, torch.float32)]
)


class DriverOfAnother:
    """What Triton asks of a GPU before it compiles, for one of a compute capability such as 90, which is not here."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # under which Triton keeps what it has compiled

    def get_current_stream(self, device: str) -> int:
        return 0


@pytest.fixture
def compile_for(monkeypatch) -> Callable[[int, Callable[[], object]], list[tuple[str, str]]]:
    """A function of a compute capability and a call: the names and the machine code of all kernels that it launches.

    They are compiled as for a launch on such a GPU, and not launched.
    """
    run, kernels = JITFunction.run, []

    def compile_alone(self, *args, grid, warmup, **kwargs):
        kernels.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs).asm["sass"]))

    def compile_for(capability, call):
        monkeypatch.setattr(triton.runtime.driver, "_active", DriverOfAnother(capability))
        monkeypatch.setattr(JITFunction, "run", compile_alone)
        call()
        return kernels

    return compile_for


def has_products(code: str) -> bool:
    return bool(re.search(r"\bHG?MMA\b", code))  # of tensor cores


def spills(code: str) -> bool:
    """Whether a loop moves registers to memory and back."""
    lines = [line.partition("\t")[2] or line for line in code.splitlines()]
    labels = {line.removesuffix(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    jumps = ((i, re.search(r"BRA(?:\.U)? (\w+);", line)) for i, line in enumerate(lines))
    # Triton cuts long listings off: labels after that are ahead of all jumps.
    starts = ((labels.get(jump[1], len(lines)), i) for i, jump in jumps if jump)
    loops = ("\n".join(lines[start:end]) for start, end in starts if start < end)
    return any(re.search(r"\b(STL|LDL)\b", loop) for loop in loops)


@GPUS
def test_token_merging(compile_for, capability, dtype):
    x, offset = torch.randn(1, 4, 4, 384, dtype=dtype), torch.randn(1, 2, 2, 8, dtype=dtype)
    matrix, bias = torch.randn(768, 4 * 384, dtype=dtype), torch.randn(768, dtype=dtype)

    def both():
        out = dtm.deform_conv(x, offset, matrix, bias, 2)
        dtm.deform_conv_backward(out, x, offset, matrix, 2)

    kernels = compile_for(capability, both)
    backward = ["_read_patches", "_list_patches", "_list_patches", "_sum_patches"]
    assert [name for name, _ in kernels] == ["_read_patches", *backward]
    for name, code in kernels:
        assert not spills(code), name


@GPUS
def test_attention(compile_for, capability, dtype):
    h, w, heads, d = 20, 33, 2, 32  # the published heads
    qkv = torch.randn(1, h * w, 3, heads, d, dtype=dtype)
    table = torch.randn(heads, 2 * h - 1, 2 * w - 1)

    def both():
        out, lse = attention.relative_attention(qkv, table, w)
        attention._backward(out, qkv, table, out, lse, w)

    kernels = compile_for(capability, both)
    assert [name for name, _ in kernels] == ["_fwd", "_bwd_dq", "_bwd_dkdv", "_bwd_dtable"]
    for name, code in kernels:
        assert has_products(code), name
        # On older GPUs one kernel has too many operands in full float32, where each is held as two numbers.
        assert not spills(code) or (capability, dtype, name) == (80, torch.float32, "_bwd_dkdv"), name


def test_without_a_c_compiler_torchs_operations_take_over_and_a_warning_says_so(run_code):
    code = """
import torch
from torch._subclasses import FakeTensorMode
from litvit.triton_support import runs_triton
from litvit.dtm import DeformableTokenMerging

torch.cuda.get_device_capability = lambda _: (9, 0)
with FakeTensorMode(), torch.device("cuda"):
    print(DeformableTokenMerging(8, 16)(torch.empty(1, 4, 4, 8)).shape, runs_triton(torch.device("cuda")))
"""
    for environment, runs, warnings in (({"PATH": "/no/such/folder"}, False, 1), ({"PATH": "", "CC": "cc"}, True, 0)):
        out, err = run_code(code, **environment)
        assert out == f"torch.Size([1, 2, 2, 16]) {runs}\n"
        assert err.count("Triton's kernels need a C compiler and Python's headers") == warnings, err
