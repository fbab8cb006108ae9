"""Deformable convolution on a GPU: Triton kernels, seen by autograd and torch.compile as one operator.

Forward reads patches bilinearly (`_read_patches`) and has torch multiply them with the weight. A kernel that does both
reads each patch again for every 256 channels out: as fast for fewer, slower for more. Patches are not kept: backward
reads them again beside its two matrix products, which gives the gradient of the offsets too. The gradient of the tokens
scatters patches to four tokens each; adding them up in memory would cost sixteen atomic additions a channel and output
token and a float32 buffer. Instead the patches are listed by the token they touch, a counting sort of integers
(`_list_patches`), and every token sums its own list in float32 (`_sum_patches`).

Shape letters as in `deform_conv`; M = B*h*w tokens out, a patch is one of the k*k taps of a token out. Coordinates are
float32, and all sums but those of torch's products. The semantics are those of the plain formulation to the letter:
what lies outside the map weighs 0, NaN gives NaN, the slope at whole positions is the one from the right.
"""

# ruff: noqa: N803 (kernels take sizes as arguments)

import torch
import triton
import triton.language as tl
from torch import Tensor

# Without this a size that 16 divides, or 1, would have kernels of its own: seconds of compiling for maps of any size.
_jit = triton.jit(do_not_specialize=["M", "h", "w", "H", "W", "tokens"])


@triton.jit
def _corner(floor, last):
    # NaN is not above 0.
    return tl.where(floor > 0, tl.minimum(floor, last), 0.0)


@triton.jit
def _weight(distance):
    weight = 1 - tl.abs(distance)
    return tl.where(weight < 0, 0.0, weight)


@triton.jit
def _slope(distance):
    return tl.where((distance >= -1) & (distance < 1), tl.where(distance < 0, 1.0, -1.0), 0.0)


@triton.jit
def _locate(offset, token, tap, h, w, H, W, K: tl.constexpr):
    """The token at the first of the four corners of a patch, and the patch's distance from it, down and right."""
    place = offset + (token.to(tl.int64) * (K * K) + tap) * 2
    y = tl.load(place).to(tl.float32) + (token // w % h * K + tap // K)
    x = tl.load(place + 1).to(tl.float32) + (token % w * K + tap % K)
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
    """Patches; if their gradient is given, that of the offsets too."""
    patch = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = patch < M * K * K
    token = tl.minimum(patch // (K * K), M - 1)
    first, down, right = _locate(offset, token, patch % (K * K), h, w, H, W, K)
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
        place = row + c[None, :]
        tl.store(patches + place, (upper * above + lower * under).to(patches.dtype.element_ty), mask)
        if patch_grad is not None:
            grad = tl.load(patch_grad + place, mask, 0.0).to(tl.float32)
            y_grad += grad * (upper_slope * above + lower_slope * under)
            x_grad += grad * (near_slope * (upper * x00 + lower * x10) + far_slope * (upper * x01 + lower * x11))
    if patch_grad is not None:
        place = offset_grad + patch.to(tl.int64) * 2
        tl.store(place, tl.sum(y_grad, 1).to(offset_grad.dtype.element_ty), inside)
        tl.store(place + 1, tl.sum(x_grad, 1).to(offset_grad.dtype.element_ty), inside)


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
    """Count the patches that touch a token; then, counting down, put them in the list that ends at `end`."""
    patch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.minimum(patch // (K * K), M - 1)
    first, down, right = _locate(offset, token, patch % (K * K), h, w, H, W, K)
    for corner in tl.static_range(4):
        touched = first + corner // 2 * W + corner % 2
        weight = _weight(down - corner // 2) * _weight(right - corner % 2)
        # What has no weight stays out; at offsets of 0 that is three corners of four.
        mask = (patch < M * K * K) & (weight != 0)
        if FILL:
            place = tl.load(end + touched, mask, 0) - tl.atomic_add(count + touched, -1, mask, sem="relaxed")
            tl.store(listed_patch + place, patch, mask)
            tl.store(listed_weight + place, weight, mask)
        else:
            tl.atomic_add(count + touched, 1, mask, sem="relaxed")


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
    """The gradient of every token: the weighted sum of the gradients of the patches on its list."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(end + token - 1, (token > 0) & (token < tokens), 0)
    length = (tl.load(end + token, token < tokens, 0) - begin).to(tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(tl.max(length, 0)):
        listed = i < length
        patch = tl.load(listed_patch + begin + i, listed, 0)
        weight = tl.load(listed_weight + begin + i, listed, 0.0)
        place = patch_grad + patch.to(tl.int64)[:, None] * C + c[None, :]
        total += weight[:, None] * tl.load(place, listed[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
    place = x_grad + token.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(place, total.to(x_grad.dtype.element_ty), (token < tokens)[:, None] & (c < C)[None, :])


@torch.library.custom_op("litvit::deform_conv", mutates_args=())
def deform_conv(x: Tensor, offset: Tensor, matrix: Tensor, bias: Tensor | None, k: int) -> Tensor:
    """Deformable convolution with stride = kernel size, see `litvit.dtm.deform_conv_tokens`.

    Tensors may differ in type: float32, bfloat16 or float16 each. Sampled patches are rounded to the type of `matrix`.

    Args:
        x: tokens, (B, H, W, C), H and W at least 2.
        offset: (B, h, w, 2*k*k), in pixels.
        matrix: the weight as (O, k*k*C), taps in reading order.
        bias: (O,) or None.
        k: kernel size and stride.

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
    """Gradients of the tokens, offsets and matrix of `deform_conv`, from that of its result, (B, h, w, O)."""
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
    if ctx.bias_dtype is not None:  # in two steps: torch sums few long columns on few of a GPU's processors
        bias_grad = grad.sum(2, dtype=torch.float32).sum((0, 1)).to(ctx.bias_dtype)
    return *deform_conv_backward(grad, *ctx.saved_tensors, ctx.k), bias_grad, None


deform_conv.register_autograd(_backward, setup_context=_setup_context)


def _sizes(x: Tensor, offset: Tensor) -> dict[str, int]:
    B, h, w, _ = offset.shape
    return {"M": B * h * w, "h": h, "w": w, "H": x.shape[1], "W": x.shape[2]}


def _tile(C: int) -> dict[str, int]:
    """1024 numbers: patches or tokens by the largest power of two of channels that divides C, from 16 to 128."""
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
