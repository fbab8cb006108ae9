"""Deformable convolution on a GPU: Triton kernels, one operator for autograd and torch.compile.

Forward reads patches bilinearly (`_read_patches`), and torch multiplies them with the weight. (A kernel that does both
reads each patch again for every 256 output channels: it is as fast for fewer channels and slower for more.) Patches
are not kept. Backward reads them again for its two matrix products, and computes the gradient of the offsets too. The
gradient of each patch belongs to four tokens. Adding these up in memory would cost sixteen atomic additions per channel
and output token, and a float32 buffer. Instead a counting sort of integers lists the patches of each token
(`_list_patches`), and each token sums its own list in float32 (`_sum_patches`).

Shape letters as in `deform_conv`. M = B*h*w output tokens; a patch is one of the k*k taps of an output token.
Coordinates are float32, and so are all sums except those in torch's products. Results are those of the plain
formulation: what lies outside the map has weight 0, NaN gives NaN, the slope at whole positions is the right-hand one.
"""

# ruff: noqa: N803 (kernels take sizes as arguments)

import torch
import triton
import triton.language as tl
from torch import Tensor

# Without this Triton compiles further kernels for sizes that are 1 or divisible by 16, which takes seconds for each.
_jit = triton.jit(do_not_specialize=["M", "h", "w", "H", "W", "tokens"])


@triton.jit
def _corner(floor, last):
    # NaN gives 0, because no comparison with NaN is true.
    return tl.where(floor > 0, tl.minimum(floor, last), 0.0)


@triton.jit
def _weight(distance):
    weight = 1 - tl.abs(distance)
    return tl.where(weight < 0, 0.0, weight)


@triton.jit
def _slope(distance):
    return tl.where((distance >= -1) & (distance < 1), tl.where(distance < 0, 1.0, -1.0), 0.0)


@triton.jit
def _first_corner(offset, token, tap, h, w, H, W, K: tl.constexpr):
    """Return the token at the first of a patch's four corners, and the patch's distance from it down and right."""
    pointer = offset + (token.to(tl.int64) * (K * K) + tap) * 2
    y = tl.load(pointer).to(tl.float32) + (token // w % h * K + tap // K)
    x = tl.load(pointer + 1).to(tl.float32) + (token % w * K + tap % K)
    top = _corner(tl.floor(y), H - 2.0)
    left = _corner(tl.floor(x), W - 2.0)
    first = (token // (h * w) * H + top.to(tl.int32)) * W + left.to(tl.int32)
    return first, y - top, x - left


@triton.jit
def _load_corners(x, first, c, mask, W, C: tl.constexpr):
    rows = x + first.to(tl.int64)[:, None] * C + c[None, :]
    below = rows + W.to(tl.int64) * C
    return (
        tl.load(rows, mask, 0.0).to(tl.float32),
        tl.load(rows + C, mask, 0.0).to(tl.float32),
        tl.load(below, mask, 0.0).to(tl.float32),
        tl.load(below + C, mask, 0.0).to(tl.float32),
    )


@_jit
def _read_patches(
    x,
    offset,
    patches,
    patch_grad,
    offset_grad,
    M,
    h,
    w,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Read patches bilinearly. If their gradient is given, compute that of the offsets too."""
    patch = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = patch < M * K * K
    token = tl.minimum(patch // (K * K), M - 1)
    first, down, right = _first_corner(offset, token, patch % (K * K), h, w, H, W, K)
    upper, lower = _weight(down)[:, None], _weight(down - 1)[:, None]
    near, far = _weight(right)[:, None], _weight(right - 1)[:, None]
    row = patch.to(tl.int64)[:, None] * C
    if patch_grad is not None:
        upper_slope, lower_slope = _slope(down)[:, None], _slope(down - 1)[:, None]
        near_slope, far_slope = _slope(right)[:, None], _slope(right - 1)[:, None]
        y_grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        x_grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < C)[None, :]
        x00, x01, x10, x11 = _load_corners(x, first, c, mask, W, C)
        above, under = near * x00 + far * x01, near * x10 + far * x11
        index = row + c[None, :]
        tl.store(patches + index, (upper * above + lower * under).to(patches.dtype.element_ty), mask)
        if patch_grad is not None:
            grad = tl.load(patch_grad + index, mask, 0.0).to(tl.float32)
            y_grad += grad * (upper_slope * above + lower_slope * under)
            x_grad += grad * (near_slope * (upper * x00 + lower * x10) + far_slope * (upper * x01 + lower * x11))
    if patch_grad is not None:
        pointer = offset_grad + patch.to(tl.int64) * 2
        tl.store(pointer, tl.sum(y_grad, 1).to(offset_grad.dtype.element_ty), inside)
        tl.store(pointer + 1, tl.sum(x_grad, 1).to(offset_grad.dtype.element_ty), inside)


@_jit
def _list_patches(
    offset,
    count,
    end,
    listed_patch,
    listed_weight,
    M,
    h,
    w,
    H,
    W,
    K: tl.constexpr,
    FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the patches that read each token; with FILL, count down again and write each token's list before `end`."""
    patch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.minimum(patch // (K * K), M - 1)
    first, down, right = _first_corner(offset, token, patch % (K * K), h, w, H, W, K)
    for corner in tl.static_range(4):
        corner_token = first + corner // 2 * W + corner % 2
        weight = _weight(down - corner // 2) * _weight(right - corner % 2)
        # Corners without weight are not listed. At offsets of 0 these are three of four.
        mask = (patch < M * K * K) & (weight != 0)
        if FILL:
            index = tl.load(end + corner_token, mask, 0) - tl.atomic_add(count + corner_token, -1, mask, sem="relaxed")
            tl.store(listed_patch + index, patch, mask)
            tl.store(listed_weight + index, weight, mask)
        else:
            tl.atomic_add(count + corner_token, 1, mask, sem="relaxed")


@_jit
def _sum_patches(
    patch_grad,
    end,
    listed_patch,
    listed_weight,
    x_grad,
    tokens,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of each token: the weighted sum of the gradients of the patches on its list."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(end + token - 1, (token > 0) & (token < tokens), 0)
    length = (tl.load(end + token, token < tokens, 0) - begin).to(tl.int32)
    grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(tl.max(length, 0)):
        listed = i < length
        patch = tl.load(listed_patch + begin + i, listed, 0)
        weight = tl.load(listed_weight + begin + i, listed, 0.0)
        pointers = patch_grad + patch.to(tl.int64)[:, None] * C + c[None, :]
        grad += weight[:, None] * tl.load(pointers, listed[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
    pointers = x_grad + token.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(pointers, grad.to(x_grad.dtype.element_ty), (token < tokens)[:, None] & (c < C)[None, :])


@torch.library.custom_op("litvit::deform_conv", mutates_args=())
def deform_conv(x: Tensor, offset: Tensor, matrix: Tensor, bias: Tensor | None, k: int) -> Tensor:
    """Compute a deformable convolution with stride = kernel size, see `litvit.dtm.deform_conv_tokens`.

    Each tensor may be float32, bfloat16 or float16. Sampled patches are rounded to the type of `matrix`.

    Args:
        x: Tokens, (B, H, W, C), H and W at least 2.
        offset: Offsets in pixels, (B, h, w, 2*k*k).
        matrix: Weight as a matrix, (O, k*k*C), taps in reading order.
        bias: Bias, (O,) or None.
        k: Kernel size and stride.

    Returns:
        Tokens, (B, h, w, O), of the type of `matrix`.
    """
    x, offset = x.contiguous(), offset.contiguous()
    patches = matrix.new_empty(offset.shape[:3].numel(), matrix.shape[1])
    _launch_read_patches(x, offset, patches, None, None, k)
    with torch.autocast(x.device.type, enabled=False):
        out = patches @ matrix.T if bias is None else torch.addmm(bias.to(matrix.dtype), patches, matrix.T)
    return out.view(*offset.shape[:3], matrix.shape[0])


@deform_conv.register_fake
def _(x: Tensor, offset: Tensor, matrix: Tensor, bias: Tensor | None, k: int) -> Tensor:
    return matrix.new_empty(*offset.shape[:3], matrix.shape[0])


@torch.library.custom_op("litvit::deform_conv_backward", mutates_args=())
def deform_conv_backward(
    grad: Tensor, x: Tensor, offset: Tensor, matrix: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients of the tokens, offsets and matrix of `deform_conv` from that of its result, (B, h, w, O)."""
    x, offset = x.contiguous(), offset.contiguous()
    sizes = _sizes(x, offset)
    M, C = sizes["M"], x.shape[3]
    grad = grad.reshape(M, matrix.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        patch_grad = grad @ matrix
    patches, x_grad, offset_grad = torch.empty_like(patch_grad), torch.empty_like(x), torch.empty_like(offset)
    tokens = x.shape[:3].numel()
    count = torch.zeros(tokens, dtype=torch.int32, device=x.device)
    listed_patch = count.new_empty(4 * M * k * k)
    listed_weight = torch.empty_like(listed_patch, dtype=torch.float32)
    _launch_read_patches(x, offset, patches, patch_grad, offset_grad, k)
    with torch.autocast(x.device.type, enabled=False):
        matrix_grad = grad.T @ patches
    with torch.cuda.device_of(x):
        list_grid = (triton.cdiv(M * k * k, 256),)
        lists = (offset, count, count, listed_patch, listed_weight)
        _list_patches[list_grid](*lists, **sizes, K=k, FILL=False, BLOCK=256)
        end = count.cumsum(0)
        lists = (offset, count, end, listed_patch, listed_weight)
        _list_patches[list_grid](*lists, **sizes, K=k, FILL=True, BLOCK=256)
        tile = _tile(C)
        sum_grid = triton.cdiv(tokens, tile["BLOCK_M"]), triton.cdiv(C, tile["BLOCK_C"])
        _sum_patches[sum_grid](patch_grad, end, listed_patch, listed_weight, x_grad, tokens, C=C, **tile)
    return x_grad, offset_grad, matrix_grad


@deform_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, offset: Tensor, matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, offset, matrix))


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, offset, matrix, bias, ctx.k = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, offset, matrix)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    bias_grad = None
    if ctx.bias_dtype is not None:  # in two steps, because torch sums few long columns on few of a GPU's processors
        bias_grad = grad.sum(2, dtype=torch.float32).sum((0, 1)).to(ctx.bias_dtype)
    return *deform_conv_backward(grad, *ctx.saved_tensors, ctx.k), bias_grad, None


deform_conv.register_autograd(_backward, setup_context=_setup_context)


def _sizes(x: Tensor, offset: Tensor) -> dict[str, int]:
    B, h, w, _ = offset.shape
    return {"M": B * h * w, "h": h, "w": w, "H": x.shape[1], "W": x.shape[2]}


def _tile(C: int) -> dict[str, int]:
    """Return a tile of 1024 elements: its channels are the largest power of two that divides C, from 16 to 128."""
    channels = max(16, min(128, C & -C))
    return {"BLOCK_M": 1024 // channels, "BLOCK_C": channels}


def _launch_read_patches(
    x: Tensor, offset: Tensor, patches: Tensor, patch_grad: Tensor | None, offset_grad: Tensor | None, k: int
) -> None:
    tile = _tile(x.shape[3])
    with torch.cuda.device_of(x):
        _read_patches[(triton.cdiv(offset.numel() // 2, tile["BLOCK_M"]),)](
            x, offset, patches, patch_grad, offset_grad, **_sizes(x, offset), C=x.shape[3], K=k, **tile
        )
