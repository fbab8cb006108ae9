"""What fast paths ask of the device, of torch.compile, and of the C library."""

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
import warnings
from pathlib import Path

import torch

# What the kernels take, if Triton is installed and LIT_TRITON=0 does not forbid it.
TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("LIT_TRITON") != "0"
TRITON_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@torch.compiler.assume_constant_result
def runs_triton(device: torch.device) -> bool:
    """Whether the kernels run on a device: an NVIDIA GPU of compute capability 8.0 or more, where they can be built."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return TRITON and nvidia and torch.cuda.get_device_capability(device) >= (8, 0) and _can_build()


@functools.cache
def _can_build() -> bool:
    """Whether Triton finds what it builds launchers with: a C compiler, Python's headers. Warns once if it does not."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks
    headers = Path(sysconfig.get_path("include", scheme), "Python.h").is_file()
    if "CC" in os.environ or (headers and any(map(shutil.which, ("gcc", "clang")))):
        return True
    warnings.warn(
        "Triton's kernels need a C compiler and Python's headers: install gcc and python3-dev. Until then slower "
        "operations of torch take their place. (CC=gcc in the environment has the kernels tried all the same, "
        "LIT_TRITON=0 does without them and this warning.)",
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

    Large tensors are otherwise new pages each time, which the system clears first: up to 30% of a step's time on a
    CPU. The process takes up what it took at its peak until it ends, and so do those that it forks; where sizes
    change, the peak is about a tenth higher. Nothing is changed where the environment sets the same (MALLOC_MMAP_MAX_,
    MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, or their like in GLIBC_TUNABLES), and where the C library is not
    glibc.
    """
    own = any(name.startswith(("MALLOC_MMAP", "MALLOC_TRIM")) for name in os.environ)
    own |= bool(re.search(r"malloc\.(mmap|trim)", os.environ.get("GLIBC_TUNABLES", "")))
    if own or platform.libc_ver()[0] != "glibc":
        return
    set_option = ctypes.CDLL(None).mallopt
    set_option(-8, 1)  # M_ARENA_MAX: all threads share the heap, others of their own are given back
    set_option(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
    set_option(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def is_static(size: int | torch.SymInt) -> bool:
    """Whether the graph that torch.compile is making is for this size alone."""
    try:
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:  # in older torch
        return False
    return has_static_value(size)
