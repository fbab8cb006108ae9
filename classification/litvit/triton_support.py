"""Where Triton's kernels run, and in which precision they multiply."""

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from pathlib import Path

import torch

# Whether Triton is installed, and LIT_TRITON=0 does not forbid it.
TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("LIT_TRITON") != "0"
# Types that the kernels take.
TRITON_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@torch.compiler.assume_constant_result
def runs_triton(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU of compute capability 8.0 or more for which kernels can be built."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return TRITON and nvidia and torch.cuda.get_device_capability(device) >= (8, 0) and _can_build()


@functools.cache
def _can_build() -> bool:
    """Return whether Triton finds a C compiler and Python's headers, which it builds launchers with; warn if not."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks
    headers = Path(sysconfig.get_path("include", scheme), "Python.h").is_file()
    if "CC" in os.environ or (headers and any(map(shutil.which, ("gcc", "clang")))):
        return True
    warnings.warn(
        "Triton's kernels need a C compiler and Python's headers: install gcc and python3-dev. Until then slower "
        "operations of torch are used. (CC=gcc in the environment tries the kernels all the same, LIT_TRITON=0 turns "
        "them and this warning off.)",
        stacklevel=2,
    )
    return False


def interprets_triton(device: torch.device) -> bool:
    """Return whether a device is a CPU and TRITON_INTERPRET=1 makes Triton's interpreter run the kernels there."""
    return TRITON and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def product_precision(dtype: torch.dtype) -> str:
    """Return Triton's name of the precision of matrix products: TF32 for float32 where torch's own products use it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch 2.9 introduced this setting. Reading the older one may raise once the new one is set.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    # Three products in TF32 are as exact as one in float32, and run on tensor cores.
    return "tf32" if tf32 else "tf32x3"
