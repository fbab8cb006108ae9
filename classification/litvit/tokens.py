"""Operations on channels-last tokens of a map, (B, H, W, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litvit.graphs import are_static, is_exporting


def pad_tokens(x: Tensor, multiple: int) -> Tensor:
    """Pad tokens (B, H, W, C) right and below with zeros to a multiple of `multiple` in H and W."""
    # Not -side % multiple, which torch.compile cannot follow into the sizes of resized tables.
    bottom, right = ((side + multiple - 1) // multiple * multiple - side for side in x.shape[1:3])
    return x if are_static(bottom, right) and not (bottom or right) else F.pad(x, (0, 0, 0, right, 0, bottom))


def crop_tokens(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut tokens (B, H, W, C) off right and below: (B, *size, C)."""
    if is_exporting() and not are_static(*size):
        # A slice would make the graph one for sizes with padding or one for those without, by its strides.
        rows, columns = (torch.arange(side, device=x.device) for side in size)
        return x.index_select(1, rows).index_select(2, columns)
    return x[:, : size[0], : size[1]]


def conv_tokens(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to a channels-last map. The permutations are views, nothing is copied."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
