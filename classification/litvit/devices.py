"""What fast paths ask of the device, of torch.compile, and of the C library."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import warnings

import torch

# What the kernels take, if Triton is installed and LIT_TRITON=0 does not forbid it.
TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("LIT_TRITON") != "0"
TRITON_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@torch.compiler.assume_constant_result
def runs_triton(device: torch.device) -> bool:
    """Whether the kernels run on a device: an NVIDIA GPU of compute capability 8.0 or more, beside a C compiler."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return TRITON and nvidia and torch.cuda.get_device_capability(device) >= (8, 0) and _has_compiler()


@functools.cache
def _has_compiler() -> bool:
    """Whether Triton finds the C compiler that it builds its launchers with; warns once if it does not."""
    if "CC" in os.environ or any(map(shutil.which, ("gcc", "clang"))):
        return True
    warnings.warn(
        "Triton's kernels need a C compiler, and there is none: install gcc, or name one in the environment variable "
        "CC. Until then slower operations of torch take their place (LIT_TRITON=0 chooses them without this warning)",
        stacklevel=2,
    )
    return False


def interprets_triton(device: torch.device) -> bool:
    """Whether Triton's interpreter runs the kernels on a device: a CPU, if the environment says TRITON_INTERPRET=1."""
    return TRITON and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def product_precision(dtype: torch.dtype) -> str:
    """Name Triton's precision for matrix products: for float32, TF32 where torch's own products may use it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch 2.9 brought this setting and knows the older one by it; asking the older one may raise there.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    # Three products in TF32 are as exact as one in float32, and run on tensor cores.
    return "tf32" if tf32 else "tf32x3"


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones, in this process, and not give it back.

    Large tensors are otherwise new pages each time, which the system clears first: up to a third of a step's time on a
    CPU. The process takes up no more at its peak, and takes that up until it ends. Nothing is changed where the
    environment has settings of malloc, and where the C library is not glibc.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        set_option(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def is_static(size: int | torch.SymInt) -> bool:
    """Whether the graph that torch.compile is making is for this size alone."""
    try:
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:  # in older torch
        return False
    return has_static_value(size)
