"""Triton kernels of attention with a relative position bias, forward and backward, that write no N x N tensor.

Shape letters: B images, (h, w) map, N = h*w tokens, D channels a head.

Token i of a map has the place y*(2w - 1) + x in the table's reading order: the bias of query i and key j lies at
place(i) - place(j) + place(N - 1). The softmax is computed on the way, as in FlashAttention (Dao et al., 2022); its
statistics, all sums and the bias are float32 whatever the type of the tokens. Every sum has a fixed order, so two runs
give the same numbers.
"""

# ruff: noqa: N803 (sizes and constants of kernels are arguments)

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from litvit.devices import product_precision

_LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _place(token, w):
    # token // w by the reciprocal in units of 2**-32, exact while token * w < 2**32: a division is far slower.
    reciprocal = tl.full((), 0xFFFFFFFF, tl.uint32) // w.to(tl.uint32) + 1
    return token + tl.umulhi(token.to(tl.uint32), reciprocal).to(tl.int32) * (w - 1)


@triton.jit
def _load(x, tokens, stride, end, D: tl.constexpr, RAGGED: tl.constexpr = True):
    """Read tokens as (tokens, D), zeros for those from `end` on if it is RAGGED."""
    at = x + tokens[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(at, mask=tokens[:, None] < end, other=0.0) if RAGGED else tl.load(at)


@triton.jit
def _load_bias(table, tokens, w, end, SIGN: tl.constexpr, RAGGED: tl.constexpr):
    """Read the table's entries that lie `tokens` away, forwards or (SIGN -1) backwards, from each of `table`."""
    if RAGGED:
        tokens = tl.minimum(tokens, end - 1)
    return tl.load(table[:, None] + SIGN * _place(tokens, w)[None, :]).to(tl.float32)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:  # bfloat16 is an integer there
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _locate(tiles, heads):
    """Tile, head and image of this program."""
    plane = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, plane % heads, (plane // heads).to(tl.int64)


@triton.jit
def _attend(
    top, total, acc, query, table, k, v, first, stride, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Show queries the keys from `first` on: new maximum, sum of exponentials and weighted sum of values."""
    j = first + tl.arange(0, BLOCK)
    key = _load(k, j, stride, N, D, RAGGED)
    value = _load(v, j, stride, N, D, RAGGED)
    score = _dot(query, tl.trans(key), None, PRECISION) * scale + _load_bias(table, j, w, N, -1, RAGGED)
    if RAGGED:
        score = tl.where((j < N)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1) * _LOG2E)
    p = tl.exp2(score * _LOG2E - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = _dot(p.to(value.dtype), value, acc * shrink[:, None], PRECISION)
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _forward(
    q, k, v, table, out, lse, image_stride, head_stride, stride, heads, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of queries, all keys."""
    tile, head, image = _locate((N + BLOCK - 1) // BLOCK, heads)
    start = image * image_stride + head * head_stride
    k, v = k + start, v + start
    middle = _place(N - 1, w)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    query = _load(q + start, i, stride, N, D)
    table += head * (2 * middle + 1) + middle + _place(tl.minimum(i, N - 1), w)

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    acc = tl.full((BLOCK, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for j in range(0, whole, BLOCK):
        top, total, acc = _attend(
            top, total, acc, query, table, k, v, j, stride, N, w, scale, D, BLOCK, PRECISION, False
        )  # fmt: skip
    if whole < N:
        top, total, acc = _attend(
            top, total, acc, query, table, k, v, whole, stride, N, w, scale, D, BLOCK, PRECISION, True
        )  # fmt: skip

    at = out + (image * N * heads + head) * D + i[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=i[:, None] < N)
    tl.store(lse + (image * heads + head) * N + i, top + tl.log2(total), mask=i < N)


@triton.jit
def _pull(
    acc, query, gradient, sums, drift, table, k, v, first, stride, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add to queries' gradients what the keys from `first` on give."""
    j = first + tl.arange(0, BLOCK)
    key = _load(k, j, stride, N, D, RAGGED)
    value = _load(v, j, stride, N, D, RAGGED)
    score = _dot(query, tl.trans(key), None, PRECISION) * scale + _load_bias(table, j, w, N, -1, RAGGED)
    p = tl.exp2(score * _LOG2E - sums[:, None])
    if RAGGED:
        p = tl.where((j < N)[None, :], p, 0.0)
    ds = p * (_dot(gradient, tl.trans(value), None, PRECISION) - drift[:, None])
    return _dot(ds.to(key.dtype), key, acc, PRECISION)


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _backward_q(
    q, k, v, table, out, lse, grad, delta, grad_q, image_stride, head_stride, stride, heads, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of queries, all keys. It also writes delta, every query's product of gradient and output."""
    tile, head, image = _locate((N + BLOCK - 1) // BLOCK, heads)
    start = image * image_stride + head * head_stride
    k, v = k + start, v + start
    own = (image * N * heads + head) * D
    row = (image * heads + head) * N
    middle = _place(N - 1, w)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    query = _load(q + start, i, stride, N, D)
    gradient = _load(grad + own, i, heads * D, N, D)
    output = _load(out + own, i, heads * D, N, D)
    table += head * (2 * middle + 1) + middle + _place(tl.minimum(i, N - 1), w)
    sums = tl.load(lse + row + i, mask=i < N, other=float("inf"))
    drift = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + row + i, drift, mask=i < N)

    acc = tl.full((BLOCK, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for j in range(0, whole, BLOCK):
        acc = _pull(
            acc, query, gradient, sums, drift, table, k, v, j, stride, N, w, scale, D, BLOCK, PRECISION, False
        )  # fmt: skip
    if whole < N:
        acc = _pull(
            acc, query, gradient, sums, drift, table, k, v, whole, stride, N, w, scale, D, BLOCK, PRECISION, True
        )  # fmt: skip
    at = grad_q + own + i[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    tl.store(at, (acc * scale).to(grad_q.dtype.element_ty), mask=i[:, None] < N)


@triton.jit
def _push(
    k_acc, v_acc, key, value, table, q, grad, lse, delta, first, stride, grad_stride, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add to keys' and values' gradients what the queries from `first` on give."""
    i = first + tl.arange(0, BLOCK)
    query = _load(q, i, stride, N, D, RAGGED)
    gradient = _load(grad, i, grad_stride, N, D, RAGGED)
    if RAGGED:
        # An infinite sum of exponentials leaves no weight.
        sums = tl.load(lse + i, mask=i < N, other=float("inf"))
        drift = tl.load(delta + i, mask=i < N, other=0.0)
    else:
        sums = tl.load(lse + i)
        drift = tl.load(delta + i)
    score = _dot(key, tl.trans(query), None, PRECISION) * scale + _load_bias(table, i, w, N, 1, RAGGED)
    p = tl.exp2(score * _LOG2E - sums[None, :])
    v_acc = _dot(p.to(gradient.dtype), gradient, v_acc, PRECISION)
    ds = p * (_dot(value, tl.trans(gradient), None, PRECISION) - drift[None, :])
    return _dot(ds.to(query.dtype), query, k_acc, PRECISION), v_acc


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _backward_kv(
    q, k, v, table, lse, grad, delta, grad_k, grad_v, image_stride, head_stride, stride, heads, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of keys, all queries."""
    tile, head, image = _locate((N + BLOCK - 1) // BLOCK, heads)
    start = image * image_stride + head * head_stride
    own = (image * N * heads + head) * D
    row = (image * heads + head) * N
    q, grad, lse, delta = q + start, grad + own, lse + row, delta + row
    middle = _place(N - 1, w)
    j = tile * BLOCK + tl.arange(0, BLOCK)
    key = _load(k + start, j, stride, N, D)
    value = _load(v + start, j, stride, N, D)
    table += head * (2 * middle + 1) + middle - _place(tl.minimum(j, N - 1), w)

    k_acc = tl.full((BLOCK, D), 0.0, tl.float32)
    v_acc = tl.full((BLOCK, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        k_acc, v_acc = _push(
            k_acc, v_acc, key, value, table, q, grad, lse, delta, i, stride, heads * D, N, w, scale,
            D, BLOCK, PRECISION, False,
        )  # fmt: skip
    if whole < N:
        k_acc, v_acc = _push(
            k_acc, v_acc, key, value, table, q, grad, lse, delta, whole, stride, heads * D, N, w, scale,
            D, BLOCK, PRECISION, True,
        )  # fmt: skip
    at = own + j[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    tl.store(grad_k + at, (k_acc * scale).to(grad_k.dtype.element_ty), mask=j[:, None] < N)
    tl.store(grad_v + at, v_acc.to(grad_v.dtype.element_ty), mask=j[:, None] < N)


@triton.jit(do_not_specialize=["images", "run", "heads", "N", "w"])
def _backward_table(
    q, k, v, table, lse, grad, delta, grad_table,
    images, run, image_stride, head_stride, stride, heads, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of (query, key) of all pairs of runs that lie the same number of runs apart, in all images.

    A run is a row of the map, or all of it. Either way pairs of runs equally far apart read the same entries of the
    table, so their gradients add up in registers. Element (head, x, place) of `grad_table` is that of the queries that
    are the x-th of their runs.
    """
    tiles = (run + BLOCK - 1) // BLOCK
    runs = N // run
    tile, shift, head = _locate(tiles * tiles, 2 * runs - 1)
    shift -= runs - 1
    begin = tl.maximum(shift, 0) * run
    end = (runs + tl.minimum(shift, 0)) * run
    back = shift * run
    xi = tile // tiles * BLOCK + tl.arange(0, BLOCK)
    xj = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    size = 2 * _place(N - 1, w) + 1
    place = size // 2 + _place(begin + tl.minimum(xi, run - 1), w)[:, None]
    place -= _place(begin - back + tl.minimum(xj, run - 1), w)[None, :]
    bias = tl.load(table + head * size + place).to(tl.float32)

    acc = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    i = begin
    start = head * head_stride
    own = head * D
    row = head * N
    for _ in range(images * (runs - tl.abs(shift))):
        query = _load(q + start + i * stride, xi, stride, run, D)
        key = _load(k + start + (i - back) * stride, xj, stride, run, D)
        value = _load(v + start + (i - back) * stride, xj, stride, run, D)
        gradient = _load(grad + own + i * (heads * D), xi, heads * D, run, D)
        sums = tl.load(lse + row + i + xi, mask=xi < run, other=float("inf"))
        drift = tl.load(delta + row + i + xi, mask=xi < run, other=0.0)
        p = tl.exp2((_dot(query, tl.trans(key), None, PRECISION) * scale + bias) * _LOG2E - sums[:, None])
        acc += p * (_dot(gradient, tl.trans(value), None, PRECISION) - drift[:, None])
        i += run
        if i == end:
            i = begin
            start += image_stride
            own += N * heads * D
            row += N * heads
    at = grad_table + (head * run + xi[:, None]) * size + place
    tl.store(at, acc, mask=(xi < run)[:, None] & (xj < run)[None, :])


@torch.library.custom_op("litvit::relative_attention", mutates_args=())
def relative_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Attention of the tokens of a map of w columns, differentiable; see `litvit.attention.relative_attention`.

    Args:
        q: queries, (B, heads, N, D), of a type and D that `litvit.attention.relative_attention` names.
        k: keys, likewise.
        v: values, likewise.
        table: (heads, 2h - 1, 2w - 1), of any floating type.
        w: columns of the map.

    Returns:
        (B, heads, N, D), and the binary logarithm of every query's sum of exponentials, (B, heads, N) in float32, which
        has no gradient.
    """
    q, k, v, table = _side_by_side(q, k, v, table)
    B, heads, N, D = q.shape
    out, lse = _like_tokens(q), q.new_empty((B, heads, N), dtype=torch.float32)
    tile = _tile(q)
    programs = triton.cdiv(N, tile["BLOCK"]) * heads * B
    with torch.cuda.device_of(q):
        _forward[(programs,)](q, k, v, table, out, lse, *q.stride()[:3], heads, N, w, D**-0.5, D, **tile)
    return out, lse


@relative_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, w: int) -> tuple[Tensor, Tensor]:
    return _like_tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("litvit::relative_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, out: Tensor, lse: Tensor, w: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, table = _side_by_side(q, k, v, table)
    grad, out = (x.transpose(1, 2).contiguous() for x in (grad, out))
    B, heads, N, D = q.shape
    numbers = (*q.stride()[:3], heads, N, w, D**-0.5, D)
    tile = _tile(q)
    programs = triton.cdiv(N, tile["BLOCK"]) * heads * B
    grad_q, grad_k, grad_v = (_like_tokens(q) for _ in range(3))
    delta = torch.empty_like(lse)
    # The rows of a small map are short for a tile.
    run = N if N <= 256 else w
    grad_table = table.new_zeros((heads, run, *table.shape[1:]), dtype=torch.float32)
    # Tiles of 64 where they cover a run as closely as those of 32.
    block = min(tile["BLOCK"], 32 if triton.cdiv(run, 32) % 2 else 64)
    table_tile = tile | {"BLOCK": block, "num_warps": block // 8}  # with fewer, places and bias spill registers
    table_programs = triton.cdiv(run, block) ** 2 * (2 * (N // run) - 1) * heads
    with torch.cuda.device_of(q):
        _backward_q[(programs,)](q, k, v, table, out, lse, grad, delta, grad_q, *numbers, **tile)
        _backward_kv[(programs,)](q, k, v, table, lse, grad, delta, grad_k, grad_v, *numbers, **tile)
        _backward_table[(table_programs,)](
            q, k, v, table, lse, grad, delta, grad_table, B, run, *numbers, **table_tile
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_table.sum(1).to(table.dtype)


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, out: Tensor, lse: Tensor, w: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like_tokens(q), _like_tokens(q), _like_tokens(q), table.new_empty(table.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.w = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.w), None


relative_attention.register_autograd(_differentiate, setup_context=_save)


def _side_by_side(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of the same strides, as they come out of one projection, and a contiguous table."""
    if q.stride(3) != 1 or not q.stride() == k.stride() == v.stride():
        q, k, v = torch.stack((q, k, v)).unbind(0)
    return q, k, v, table.contiguous()


def _like_tokens(q: Tensor) -> Tensor:
    """An empty (B, heads, N, D) that lies in memory as (B, N, heads, D), ready to have its heads joined."""
    B, heads, N, D = q.shape
    return q.new_empty((B, N, heads, D)).transpose(1, 2)


def _tile(q: Tensor) -> dict[str, int | str]:
    row = q.shape[3] * q.element_size()
    block, warps = (64, 4) if row <= 64 else (32, 2)
    # The next tiles of float32 heads of 128 channels have no room in the shared memory of GPUs but the largest.
    stages = 2 if row <= 256 else 1
    return {"BLOCK": block, "PRECISION": product_precision(q.dtype), "num_warps": warps, "num_stages": stages}
