"""Deformable convolution of channels-last tokens whose kernel size is its stride.

Shape letters: B images, (H, W) input tokens, (h, w) = (H // k, W // k) output tokens, C input channels, O output
channels, k kernel size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litvit.errors import InputError
from litvit.functorch_support import transforms_are_active
from litvit.graphs import is_exporting
from litvit.triton_support import TRITON_DTYPES, interprets_triton, runs_triton


def deform_conv_tokens(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, *, triton: bool | None = None
) -> Tensor:
    """Compute a deformable convolution with stride = kernel size, no padding (LIT, "Deformable token merging").

    Tap (ky, kx) of output (i, j) reads the input at (k*i + ky + dy, k*j + kx + dx) by bilinear interpolation. Positions
    outside the map count as 0. The result is that of `torchvision.ops.deform_conv2d`. A bilinear read of channels-last
    tokens is a weighted sum of four rows, which is an embedding bag. The rest is one matrix product.

    Coordinates are float32 or better for any type of tokens, because bfloat16 columns above 256 have no fraction left.

    On a GPU, Triton kernels (`litvit.dtm.triton_kernels`) replace the plain formulation and keep no sampled patches for
    backward. They add up the gradients of tokens in an order that varies between runs. Under
    `torch.use_deterministic_algorithms(True)` the plain formulation is used instead.

    Transforms of torch.func (vmap, grad, jvp, ...) and forward-mode derivatives have rules of every order. Outside of
    them only first derivatives are available.

    Args:
        x: Tokens, (B, H, W, C). An odd last row or column has no tap of its own, as in a strided convolution.
        offset: Offsets in pixels, (B, h, w, 2*k*k): (dy, dx) of the taps in reading order. Any value is safe. NaN gives
            NaN.
        weight: Weight, (O, C, k, k).
        bias: Bias, (O,) or None.
        triton: Whether to run the Triton kernels. None runs them where they work, unless LIT_TRITON=0 is set in the
            environment. They need a GPU of compute capability 8.0 or more, Triton, a C compiler, and float32, bfloat16
            or float16. On a CPU they only run in Triton's interpreter (TRITON_INTERPRET=1), for tests.

    Returns:
        Tokens, (B, h, w, O).

    Raises:
        ValueError: Shapes do not fit.
        InputError: The kernels do not run here, and `triton` is True.
    """
    _check_shapes(x, offset, weight, bias)
    if triton and not (runs_triton(x.device) or interprets_triton(x.device)):
        needs = "Triton, a C compiler and a GPU of compute capability 8.0"
        raise InputError(f"triton=True needs {needs}, got tokens on {x.device.type}")
    if triton and not {x.dtype, offset.dtype, weight.dtype} <= TRITON_DTYPES:
        got = ", ".join(str(tensor.dtype) for tensor in (x, offset, weight))
        raise InputError(f"triton=True takes float32, bfloat16 and float16, got {got}")
    k = weight.shape[-1]
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    if min(x.shape[1:3]) == 1:
        # Each read takes two rows and two columns.
        x = F.pad(x, (0, 0, 0, 1, 0, 1))
    if _runs_triton(x, offset, matrix) if triton is None else triton:
        if torch.is_autocast_enabled(x.device.type):
            matrix = matrix.to(torch.get_autocast_dtype(x.device.type))
        from litvit.dtm.triton_kernels import deform_conv

        return deform_conv(x, offset, matrix, bias, k)
    return F.linear(sample_taps(x, offset, k), matrix, bias)


def _runs_triton(x: Tensor, offset: Tensor, matrix: Tensor) -> bool:
    return (
        runs_triton(x.device)
        and not is_exporting()
        and {x.dtype, offset.dtype, matrix.dtype} <= TRITON_DTYPES
        and (x.dtype == matrix.dtype or torch.is_autocast_enabled(x.device.type))
        and not torch.are_deterministic_algorithms_enabled()
        and not transforms_are_active()
    )


def sample_taps(x: Tensor, offset: Tensor, k: int) -> Tensor:
    """Read the k*k taps of each output token bilinearly.

    Args:
        x: Tokens, (B, H, W, C), H and W at least 2.
        offset: Offsets in pixels, (B, h, w, 2*k*k), see `deform_conv_tokens`.
        k: Kernel size and stride.

    Returns:
        Taps in reading order, (B, h, w, k*k*C).
    """
    B, H, W, C = x.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, offset.dtype), torch.float32)
    offset = offset.to(dtype)
    if transforms_are_active():
        return _sample_differentiably(x, offset, k)
    table = x.reshape(B * H * W, C)
    if torch.jit.is_tracing() or is_exporting():  # which need not, or cannot, record our own autograd functions
        index, weight = _bilinear_corners(offset, (H, W), k)[:2]
    else:
        index, weight = _BilinearCorners.apply(offset, (H, W), k)
    if is_exporting():
        taps = _sum_rows(table, index, weight)
    else:
        taps = F.embedding_bag(index, table, per_sample_weights=weight.to(x.dtype), mode="sum")
    return taps.view(*offset.shape[:3], k * k * C)


def _sum_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Compute what an embedding bag does, (M, 4) -> (M, C), by operations that all runtimes and transforms have.

    ONNX has no embedding bag: exporters write one as a loop of a turn per bag. In onnxruntime this sum is as fast as
    ONNX's DeformConv, which OpenVINO refuses, and faster than GridSample (docs/export.md).
    """
    rows = table.index_select(0, index.flatten().long()).view(*index.shape, table.shape[1])
    return (rows * weight.to(table.dtype).unsqueeze(-1)).sum(1)


def sample_map(x: Tensor, offset: Tensor, k: int) -> Tensor:
    """Read the k*k taps of each output token, as a map: its k x k patches, side by side, are the kernels' inputs.

    Args:
        x: Tokens, (B, H, W, C), H and W at least 2.
        offset: Offsets in pixels, (B, h, w, 2*k*k), see `deform_conv_tokens`.
        k: Kernel size and stride.

    Returns:
        Map, (B, k*h, k*w, C).
    """
    taps = sample_taps(x, offset, k).unflatten(3, (k, k, -1))
    return taps.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _sample_differentiably(x: Tensor, offset: Tensor, k: int) -> Tensor:
    """Read taps as `sample_taps` does, by operations that have every derivative and a rule for vmap."""
    B, H, W, C = x.shape
    index, _, distance, axis_weight = _bilinear_corners(offset, (H, W), k)
    slope = _slope(distance.detach())
    axis_weight = torch.where(slope == 0, axis_weight.detach(), 1 + slope * distance)
    weight = (axis_weight[..., 0, :, None] * axis_weight[..., 1, None, :]).reshape(-1, 4)
    return _sum_rows(x.reshape(B * H * W, C), index, weight).view(*offset.shape[:3], k * k * C)


def _slope(distance: Tensor) -> Tensor:
    """Return the right-hand derivative of the weight, max(0, 1 - |distance|), by the distance."""
    cell = distance.floor()
    return torch.where(cell == 0, -1.0, (cell == -1).to(cell.dtype))


class _BilinearCorners(torch.autograd.Function):
    """Tokens and weights of the four corners of each bilinear read.

    On each axis the weight of a grid point at distance r is max(0, 1 - |r|). Beyond the map, the two points of an axis
    are the last two inside. So every index is valid, and positions outside have weight 0. The derivative is written out
    because that of max and |r| is 0 at whole positions, where training starts. Here it is the right-hand derivative, as
    in torchvision.
    """

    @staticmethod
    def forward(ctx, offset: Tensor, map_size: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
        index, weight, distance, axis_weight = _bilinear_corners(offset, map_size, k)
        ctx.save_for_backward(distance, axis_weight)
        ctx.mark_non_differentiable(index)
        return index, weight

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad: Tensor) -> tuple[Tensor | None, ...]:
        distance, axis_weight = ctx.saved_tensors
        grad = grad.view_as(axis_weight)
        y_slope, x_slope = _slope(distance).unbind(-2)
        y_weight, x_weight = axis_weight.unbind(-2)
        along_x = grad[..., 0] * x_weight[..., :1] + grad[..., 1] * x_weight[..., 1:]
        along_y = grad[..., 0, :] * y_weight[..., :1] + grad[..., 1, :] * y_weight[..., 1:]
        y_grad = along_x[..., 0] * y_slope[..., 0] + along_x[..., 1] * y_slope[..., 1]
        x_grad = along_y[..., 0] * x_slope[..., 0] + along_y[..., 1] * x_slope[..., 1]
        return torch.stack((y_grad, x_grad), dim=-1).flatten(3), None, None


def _bilinear_corners(offset: Tensor, map_size: tuple[int, int], k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return index and weight of corners, (B*h*w*k*k, 4); distance and weight by axis, (B, h, w, k, k, axis, 2)."""
    B, h, w, _ = offset.shape
    H, W = map_size
    like = {"dtype": offset.dtype, "device": offset.device}
    rows = torch.arange(h * k, **like).view(h, 1, k, 1, 1)
    columns = torch.arange(w * k, **like).view(1, w, 1, k, 1)
    grid = torch.cat((rows.expand(h, w, k, k, 1), columns.expand(h, w, k, k, 1)), dim=-1)
    position = offset.reshape(B, h, w, k, k, 2) + grid
    # Clamp the integer corner and not the coordinate: a NaN or infinite offset then reads some valid token, with weight
    # NaN or 0.
    row, column = position.floor().int().unbind(-1)
    low = torch.stack((row.clamp(0, H - 2), column.clamp(0, W - 2)), dim=-1)
    # (B, h, w, k, k, axis, corner)
    distance = (position - low).unsqueeze(-1) - torch.arange(2, **like)
    axis_weight = (1 - distance.abs()).clamp(min=0)
    weight = axis_weight[..., 0, :, None] * axis_weight[..., 1, None, :]

    # 32 bits are faster to sort than 64, and enough for 2**31 tokens.
    integers = {"dtype": torch.int32, "device": offset.device}
    first = (torch.arange(B, **integers).view(B, 1, 1, 1, 1) * H + low[..., 0]) * W + low[..., 1]
    corner = torch.arange(2, **integers)
    index = first.reshape(-1, 1) + (corner.view(2, 1) * W + corner).view(4)
    return index, weight.reshape(-1, 4), distance, axis_weight


def _check_shapes(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be channels-last tokens (B, H, W, C), got shape {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be (O, C, k, k), got shape {tuple(weight.shape)}")
    B, H, W, C = x.shape
    if weight.shape[1] != C:
        raise ValueError(f"x has {C} channels, weight {tuple(weight.shape)} expects {weight.shape[1]}")
    k = weight.shape[-1]
    if k > H or k > W:
        raise ValueError(f"the map of {H} x {W} tokens is smaller than the {k} x {k} kernel")
    expected = (B, H // k, W // k, 2 * k * k)
    if offset.shape != expected:
        raise ValueError(f"offset must be (B, H//k, W//k, 2*k*k) = {expected}, got {tuple(offset.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
