"""What fast paths ask of the device, and of torch.compile."""

import importlib.util
import os

import torch

# What the kernels take, if Triton is installed and LIT_TRITON=0 does not forbid it.
TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("LIT_TRITON") != "0"
TRITON_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@torch.compiler.assume_constant_result
def runs_triton(device: torch.device) -> bool:
    """Whether the kernels run on a device: an NVIDIA GPU of compute capability 8.0 or more."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return TRITON and nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


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


def is_static(size: int | torch.SymInt) -> bool:
    """Whether the graph that torch.compile is making is for this size alone."""
    try:
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:  # in older torch
        return False
    return has_static_value(size)
