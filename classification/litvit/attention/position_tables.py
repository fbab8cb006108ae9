"""Position tables at the size of a map: absolute ones are resized bilinearly, relative ones bicubically."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from litvit.graphs import are_static, is_exporting


def resize_position_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an absolute position table bilinearly, in float32.

    Args:
        table: Absolute position table, (1, h, w, C).
        size: Height and width to resize it to.

    Returns:
        Resized table, (1, *size, C). A table of that size is returned as it is.
    """
    if are_static(*size) and tuple(table.shape[1:3]) == tuple(size):
        return table
    with _without_autocast(table):
        resized = F.interpolate(table.permute(0, 3, 1, 2).float(), size=size, mode="bilinear").permute(0, 2, 3, 1)
    return resized.to(table.dtype)


def resize_relative_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a relative position table bicubically, in float32.

    Args:
        table: Relative position table, (heads, 2h' - 1, 2w' - 1).
        grid: Height h and width w of the map to resize it for.

    Returns:
        Resized table, (heads, 2h - 1, 2w - 1). A table of that size is returned as it is.
    """
    size = tuple(2 * side - 1 for side in grid)
    if are_static(*size) and tuple(table.shape[1:]) == size:
        return table
    if is_exporting():  # a single operator of every runtime
        return F.interpolate(table[None].float(), size=size, mode="bicubic")[0].to(table.dtype)
    # Interpolation is linear and works on one axis at a time. As two matrix products its gradient needs no atomic
    # additions, which deterministic mode refuses. The matrices are interpolated identity matrices.
    with _without_autocast(table):
        rows, columns = (
            F.interpolate(torch.eye(old, device=table.device)[None, None], size=(new, old), mode="bicubic")[0, 0]
            for old, new in zip(table.shape[1:], size, strict=True)
        )
        return (rows @ table.float() @ columns.T).to(table.dtype)


def _without_autocast(table: Tensor) -> AbstractContextManager:
    # The meta device has no autocast.
    return nullcontext() if table.is_meta else torch.autocast(table.device.type, enabled=False)
