"""Attention over all tokens of a map with a learned relative position bias, on several paths.

Shape letters: B images, (h, w) map, N = h*w tokens, d channels per head.
"""

import os

import torch
from torch import Tensor

from litvit.attention.product import attend
from litvit.errors import InputError
from litvit.functorch_support import transforms_are_active
from litvit.graphs import are_static, is_exporting
from litvit.triton_support import TRITON_DTYPES, interprets_triton, runs_triton

PATHS = ("plain", "sdpa", "triton")


def relative_attention(qkv: Tensor, table: Tensor, grid: tuple[int, int], path: str | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(d) + bias) v, with a learned bias for each difference in position.

    The bias of query (yi, xi) and key (yj, xj) is table[head, yi - yj + h - 1, xi - xj + w - 1]. Three paths compute
    the same:

    - "triton", on CUDA: kernels that look the bias up in the table, forward and backward, and write no N x N scores
      or bias. They take float32 (as TF32 if torch's matrix products use it), bfloat16 and float16, and heads of 16, 32,
      64 or 128 channels. They need compute capability 8.0 and a C compiler. LIT_TRITON=0 in the environment turns them
      off.
    - "plain", on a CPU if gradients are recorded: matrix products and softmax, with the bias written out.
    - "sdpa", otherwise: torch's scaled_dot_product_attention, with the bias written out.

    Args:
        qkv: Queries, keys and values as one projection returns them, (B, N, 3, heads, d).
        table: Relative position table, (heads, 2h - 1, 2w - 1), of any floating type.
        grid: Height and width of the map, (h, w).
        path: Path to force, "plain", "sdpa" or "triton". None for the one that the environment variable LIT_ATTENTION
            names, or without it for the choice above.

    Returns:
        Output, (B, N, heads, d).

    Raises:
        InputError: The path is unknown, or cannot take these tokens.
        ValueError: Shapes do not fit.
    """
    h, w = grid
    if qkv.dim() != 5 or tuple(qkv.shape[1:3]) != (h * w, 3):
        raise ValueError(f"qkv must be (B, {h} * {w}, 3, heads, d), got {tuple(qkv.shape)}")
    heads = qkv.shape[3]
    if tuple(table.shape) != (heads, 2 * h - 1, 2 * w - 1):
        raise ValueError(f"table must be {(heads, 2 * h - 1, 2 * w - 1)}, got {tuple(table.shape)}")
    path = choose_path(qkv, path)
    if path == "triton":
        from litvit.attention import kernels

        if torch.is_autocast_enabled(qkv.device.type):
            qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
        return kernels.relative_attention(qkv, table, w)[0]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = relative_position_bias(table, grid).to(q.dtype)
    return attend(q, k, v, bias, None, fused=path == "sdpa").transpose(1, 2)


def relative_position_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Write out the bias of each query i and key j, table[yi - yj + h - 1, xi - xj + w - 1].

    Args:
        table: Relative position table, (heads, 2h - 1, 2w - 1).
        grid: Height and width of the map, (h, w).

    Returns:
        Bias, (1, heads, N, N).
    """
    h, w = grid
    if is_exporting():  # runtimes have no views of overlapping windows
        rows, columns = (torch.arange(side, device=table.device) for side in grid)
        row = rows.view(h, 1, 1, 1) - rows.view(1, 1, h, 1) + (h - 1)
        column = columns.view(1, w, 1, 1) - columns.view(1, 1, 1, w) + (w - 1)
        index = row * (2 * w - 1) + column
        return table.flatten(1).index_select(1, index.flatten()).view(1, -1, h * w, h * w)
    # Sliding windows are table[yi + a, xi + b]; with the keys in reverse order a = h - 1 - yj, b = w - 1 - xj.
    if not are_static(h, w):
        # unfold would make the sizes constants, with one graph for each. The gradient of these windows is slower.
        table = table.contiguous()
        rows, columns = table.stride()[1:]
        windows = table.as_strided((len(table), h, w, h, w), (table.stride(0), rows, columns, rows, columns))
    else:
        windows = table.unfold(1, h, 1).unfold(2, w, 1)
    return windows.flip(3, 4).reshape(1, -1, h * w, h * w)


def choose_path(qkv: Tensor, path: str | None = None) -> str:
    """Return the path that `relative_attention` takes for these tokens, one of PATHS.

    Args:
        qkv: Queries, keys and values, (B, N, 3, heads, d).
        path: Path to force, or None.

    Raises:
        InputError: The path is unknown, or cannot take these tokens.
    """
    if not qkv.is_meta:  # meta tensors only count operations
        path = path or os.environ.get("LIT_ATTENTION")
    if path and path not in PATHS:
        raise InputError(f"the path of attention must be one of {', '.join(PATHS)}, got {path!r}")
    if path == "triton" and not _kernels_take(qkv):
        raise InputError(
            "attention's path 'triton' needs Triton, a C compiler and a GPU of compute capability 8.0; float32, "
            "bfloat16 or float16; heads of 16, 32, 64 or 128 channels: "
            f"got {qkv.dtype} on {qkv.device.type} with {qkv.shape[4]}"
        )
    if path:
        return path
    if qkv.is_cuda and _kernels_take(qkv) and not transforms_are_active() and not is_exporting():
        return "triton"
    # With a bias that needs a gradient, the CPU's scaled_dot_product_attention is slower. Traces are for inference.
    recorded = torch.is_grad_enabled() and not torch.jit.is_tracing() and not is_exporting()
    return "plain" if qkv.device.type == "cpu" and recorded else "sdpa"


def _kernels_take(qkv: Tensor) -> bool:
    if qkv.dtype not in TRITON_DTYPES or qkv.shape[4] not in (16, 32, 64, 128):
        return False
    return interprets_triton(qkv.device) or runs_triton(qkv.device)
