"""Deformable convolution on a GPU: Triton kernels, seen by autograd and torch.compile as one operator.

Forward is one kernel: it reads patches bilinearly and multiplies them with the weight, tile by tile, so that they never
reach memory and are not kept for backward. Backward has its two matrix products done by torch and, beside them, reads
the patches again (`_read_patches`), which gives the gradient of the offsets too. The gradient of the tokens scatters
patches to four tokens each; adding them up in memory would cost sixteen atomic additions a channel and output token
and a float32 buffer. Instead the patches are listed by the token they touch, a counting sort of integers
(`_list_patches`), and every token sums its own list in float32 (`_sum_patches`).

Shape letters as in `deform_conv`; M = B*h*w tokens out, a patch is one of the k*k taps of a token out. Sums over the
matrix product run in float32, coordinates in float32. The semantics are those of the plain formulation to the letter:
what lies outside the map weighs 0, NaN gives NaN, the slope at whole positions is the one from the right.
"""

# ruff: noqa: E741, N803 (kernels take sizes as arguments)

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from litvit.devices import product_precision

# Triton's interpreter runs the kernels on a CPU. It can neither multiply bfloat16 matrices nor time candidates.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
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
def _forward(
    x,
    offset,
    matrix,
    bias,
    out,
    M,
    h,
    w,
    H,
    W,
    C: tl.constexpr,
    O: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Column blocks of the same tokens run side by side and share what they read in the L2 cache.
    columns = tl.cdiv(O, BLOCK_O)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(row, M - 1)
    o = tl.program_id(0) % columns * BLOCK_O + tl.arange(0, BLOCK_O)
    product = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for tap in range(K * K):
        first, down, right = _locate(offset, token, tap, h, w, H, W, K)
        upper, lower = _weight(down)[:, None], _weight(down - 1)[:, None]
        near, far = _weight(right)[:, None], _weight(right - 1)[:, None]
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            kernel = tl.load(
                matrix + o[None, :] * (K * K * C) + (tap * C + c)[:, None], (c < C)[:, None] & (o < O), 0.0
            )
            x00, x01, x10, x11 = _load_corners(x, first, c, (c < C)[None, :], W, C)
            patch = upper * (near * x00 + far * x01) + lower * (near * x10 + far * x11)
            patch = patch.to(matrix.dtype.element_ty)
            if INTERPRETED:
                patch, kernel = patch.to(tl.float32), kernel.to(tl.float32)
            product = tl.dot(patch, kernel, product, input_precision=PRECISION)
    if bias is not None:
        product += tl.load(bias + o, o < O, 0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(place, product.to(out.dtype.element_ty), (row < M)[:, None] & (o < O)[None, :])


@_jit
def _read_patches(
    x,
    offset,
    patch_grad,
    patches,
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
    """Patches and the gradient of the offsets, from the gradient of the patches."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(row, M - 1)
    inside = row < M
    for tap in range(K * K):
        first, down, right = _locate(offset, token, tap, h, w, H, W, K)
        upper, lower = _weight(down)[:, None], _weight(down - 1)[:, None]
        near, far = _weight(right)[:, None], _weight(right - 1)[:, None]
        upper_slope, lower_slope = _slope(down)[:, None], _slope(down - 1)[:, None]
        near_slope, far_slope = _slope(right)[:, None], _slope(right - 1)[:, None]
        patch_id = token.to(tl.int64) * (K * K) + tap
        y_grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        x_grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = inside[:, None] & (c < C)[None, :]
            x00, x01, x10, x11 = _load_corners(x, first, c, mask, W, C)
            place = patch_id[:, None] * C + c[None, :]
            grad = tl.load(patch_grad + place, mask, 0.0).to(tl.float32)
            above, under = near * x00 + far * x01, near * x10 + far * x11
            tl.store(patches + place, (upper * above + lower * under).to(patches.dtype.element_ty), mask)
            y_grad += grad * (upper_slope * above + lower_slope * under)
            x_grad += grad * (near_slope * (upper * x00 + lower * x10) + far_slope * (upper * x01 + lower * x11))
        tl.store(offset_grad + patch_id * 2, tl.sum(y_grad, 1).to(offset_grad.dtype.element_ty), inside)
        tl.store(offset_grad + patch_id * 2 + 1, tl.sum(x_grad, 1).to(offset_grad.dtype.element_ty), inside)


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


if not INTERPRETED:
    # Which tile is fastest depends on the GPU: measured once for every C, O and type in a process.
    _tuned_forward = triton.autotune(
        [
            triton.Config({"BLOCK_M": 64, "BLOCK_O": 256}, num_warps=8, num_stages=1),
            triton.Config({"BLOCK_M": 64, "BLOCK_O": 256}, num_warps=8, num_stages=2),
            triton.Config({"BLOCK_M": 64, "BLOCK_O": 128}, num_warps=8, num_stages=1),
            triton.Config({"BLOCK_M": 128, "BLOCK_O": 128}, num_warps=8, num_stages=1),
        ],
        key=["C", "O", "K"],
    )(_forward)


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
    x, offset, matrix = x.contiguous(), offset.contiguous(), matrix.contiguous()
    sizes = _sizes(x, offset)
    M, C, O = sizes["M"], x.shape[3], matrix.shape[0]
    out = matrix.new_empty(*offset.shape[:3], O)
    if matrix.dtype == torch.float32 or INTERPRETED:
        # More channels at once, and registers spill: three TF32 products hold every operand twice.
        kernel, channels = _forward, 16
        tile = {"BLOCK_M": 64, "BLOCK_O": 64, "num_warps": 4, "num_stages": 2}
    else:
        kernel, channels, tile = _tuned_forward, 128 // x.element_size(), {}
    with torch.cuda.device_of(x):
        kernel[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(O, meta["BLOCK_O"]),)](
            x,
            offset,
            matrix,
            bias,
            out,
            **sizes,
            C=C,
            O=O,
            K=k,
            PRECISION=product_precision(matrix.dtype),
            BLOCK_C=_channel_block(C, channels),
            **tile,
        )
    return out


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
    grad = grad.reshape(M, -1)
    patch_grad = grad @ matrix
    patches, x_grad, offset_grad = torch.empty_like(patch_grad), torch.empty_like(x), torch.empty_like(offset)
    tokens = x.shape[:3].numel()
    count = torch.zeros(tokens, dtype=torch.int32, device=x.device)
    listed_patch = count.new_empty(4 * M * k * k)
    listed_weight = torch.empty_like(listed_patch, dtype=torch.float32)
    block_c = _channel_block(C, 128)
    tile = {"BLOCK_M": 1024 // block_c, "BLOCK_C": block_c}
    with torch.cuda.device_of(x):
        _read_patches[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x, offset, patch_grad, patches, offset_grad, **sizes, C=C, K=k, **tile
        )
        matrix_grad = grad.T @ patches
        list_grid = (triton.cdiv(M * k * k, 256),)
        lists = (offset, count, count, listed_patch, listed_weight)
        _list_patches[list_grid](*lists, **sizes, K=k, FILL=False, BLOCK=256)
        end = count.cumsum(0)
        lists = (offset, count, end, listed_patch, listed_weight)
        _list_patches[list_grid](*lists, **sizes, K=k, FILL=True, BLOCK=256)
        sum_grid = triton.cdiv(tokens, tile["BLOCK_M"]), triton.cdiv(C, block_c)
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
    bias_grad = None if ctx.bias_dtype is None else grad.sum((0, 1, 2), dtype=torch.float32).to(ctx.bias_dtype)
    with torch.autocast(grad.device.type, enabled=False):  # which backward may run in, though forward did not
        grads = deform_conv_backward(grad, *ctx.saved_tensors, ctx.k)
    return *grads, bias_grad, None


deform_conv.register_autograd(_backward, setup_context=_setup_context)


def _sizes(x: Tensor, offset: Tensor) -> dict[str, int]:
    B, h, w, _ = offset.shape
    return {"M": B * h * w, "h": h, "w": w, "H": x.shape[1], "W": x.shape[2]}


def _channel_block(C: int, limit: int) -> int:
    """The largest power of two that divides C, from 16 to `limit`."""
    return max(16, min(limit, C & -C))
