"""Operations on channels-last tokens of a map, (B, H, W, C)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litvit.errors import InputError
from litvit.functorch_support import transforms_are_active
from litvit.graphs import are_static, is_exporting

PART = 2048  # tokens per thread: enough for products to run at full speed, few enough for the cache of a core


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to tokens, (B, H, W, C) -> (B, ...), a few images at a time where that is faster.

    On a CPU, what an MLP computes in between then stays in cache, and needs no new memory. With gradients it is kept
    anyway, and in a graph the compiler decides.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled() or transforms_are_active():
        return function(x)
    if type(x) is not Tensor or x.device.type != "cpu":  # what torch.fx and FakeTensorMode pass is of another type
        return function(x)
    if torch._C._len_torch_dispatch_stack():  # make_fx and the like, whose graphs would be for this number of images
        return function(x)
    images = PART * torch.get_num_threads() // max(1, x.shape[1] * x.shape[2]) or 1
    return function(x) if images >= len(x) else torch.cat([function(part) for part in x.split(images)])


def check_tokens(x: Tensor, dim: int) -> None:
    """Raise InputError if x is not tokens (B, H, W, dim)."""
    if x.dim() != 4 or x.shape[3] != dim:
        raise InputError(f"x must be tokens (B, H, W, {dim}), got shape {tuple(x.shape)}")


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
