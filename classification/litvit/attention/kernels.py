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

from litvit.triton_support import product_precision

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
def _load_bias(table, places, tokens, w, end, SIGN: tl.constexpr, RAGGED: tl.constexpr):
    """Read the table's entries that lie `tokens` away, forwards or (SIGN -1) backwards, from each of `places`."""
    if RAGGED:
        tokens = tl.minimum(tokens, end - 1)
    return _gather(table, places, SIGN * _place(tokens, w))


@triton.jit
def _gather(table, rows, columns):
    """Read the float32 entries at rows[:, None] + columns[None, :]."""
    if _INTERPRETED:
        return tl.load(table + (rows[:, None] + columns[None, :]))
    # tl.load would send every entry through shared memory. These go straight to the registers that meet them.
    return tl.inline_asm_elementwise(
        "{ .reg .u64 at; cvt.u64.u32 at, $2; add.u64 at, at, $1; ld.global.nc.f32 $0, [at]; }",
        "=f,l,r",
        [table.to(tl.uint64, bitcast=True), (4 * rows)[:, None] + (4 * columns)[None, :]],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


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
def _split(qkv, image, head, heads, N, D: tl.constexpr):
    """The first token's query, key and value, and how far apart tokens are."""
    q = qkv + (image * N * 3 * heads + head) * D
    return q, q + heads * D, q + 2 * heads * D, 3 * heads * D


@triton.jit
def _attend(
    top, total, acc, query, table, places, k, v, first, stride, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Show queries the keys from `first` on: new maximum, sum of exponentials and weighted sum of values."""
    j = first + tl.arange(0, BLOCK)
    key = _load(k, j, stride, N, D, RAGGED)
    value = _load(v, j, stride, N, D, RAGGED)
    score = _dot(query, tl.trans(key), None, PRECISION) * scale + _load_bias(table, places, j, w, N, -1, RAGGED)
    if RAGGED:
        score = tl.where((j < N)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1) * _LOG2E)
    p = tl.exp2(score * _LOG2E - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = _dot(p.to(value.dtype), value, acc * shrink[:, None], PRECISION)
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _forward(
    qkv, table, out, lse, heads, N, w, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of queries, all keys."""
    tile, head, image = _locate((N + ROWS - 1) // ROWS, heads)
    q, k, v, stride = _split(qkv, image, head, heads, N, D)
    middle = _place(N - 1, w)
    i = tile * ROWS + tl.arange(0, ROWS)
    query = _load(q, i, stride, N, D)
    table += head * (2 * middle + 1)
    places = middle + _place(tl.minimum(i, N - 1), w)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    acc = tl.full((ROWS, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for j in range(0, whole, BLOCK):
        top, total, acc = _attend(
            top, total, acc, query, table, places, k, v, j, stride, N, w, scale, D, BLOCK, PRECISION, False
        )  # fmt: skip
    if whole < N:
        top, total, acc = _attend(
            top, total, acc, query, table, places, k, v, whole, stride, N, w, scale, D, BLOCK, PRECISION, True
        )  # fmt: skip

    at = out + (image * N * heads + head) * D + i[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=i[:, None] < N)
    tl.store(lse + (image * heads + head) * N + i, top + tl.log2(total), mask=i < N)


@triton.jit
def _pull(
    acc, query, gradient, sums, drift, table, places, k, v, first, stride, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add to queries' gradients what the keys from `first` on give."""
    j = first + tl.arange(0, BLOCK)
    key = _load(k, j, stride, N, D, RAGGED)
    value = _load(v, j, stride, N, D, RAGGED)
    score = _dot(query, tl.trans(key), None, PRECISION) * scale + _load_bias(table, places, j, w, N, -1, RAGGED)
    p = tl.exp2(score * _LOG2E - sums[:, None])
    if RAGGED:
        p = tl.where((j < N)[None, :], p, 0.0)
    ds = p * (_dot(gradient, tl.trans(value), None, PRECISION) - drift[:, None])
    return _dot(ds.to(key.dtype), key, acc, PRECISION)


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _backward_q(
    qkv, table, out, lse, grad, delta, grad_qkv, heads, N, w, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of queries, all keys. It also writes delta, every query's product of gradient and output."""
    tile, head, image = _locate((N + ROWS - 1) // ROWS, heads)
    q, k, v, stride = _split(qkv, image, head, heads, N, D)
    own = (image * N * heads + head) * D
    row = (image * heads + head) * N
    middle = _place(N - 1, w)
    i = tile * ROWS + tl.arange(0, ROWS)
    query = _load(q, i, stride, N, D)
    gradient = _load(grad + own, i, heads * D, N, D)
    output = _load(out + own, i, heads * D, N, D)
    table += head * (2 * middle + 1)
    places = middle + _place(tl.minimum(i, N - 1), w)
    sums = tl.load(lse + row + i, mask=i < N, other=float("inf"))
    drift = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + row + i, drift, mask=i < N)

    acc = tl.full((ROWS, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for j in range(0, whole, BLOCK):
        acc = _pull(
            acc, query, gradient, sums, drift, table, places, k, v, j, stride, N, w, scale,
            D, BLOCK, PRECISION, False,
        )  # fmt: skip
    if whole < N:
        acc = _pull(
            acc, query, gradient, sums, drift, table, places, k, v, whole, stride, N, w, scale,
            D, BLOCK, PRECISION, True,
        )  # fmt: skip
    grad_q = _split(grad_qkv, image, head, heads, N, D)[0]
    at = i[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(grad_q + at, (acc * scale).to(grad_q.dtype.element_ty), mask=i[:, None] < N)


@triton.jit
def _push(
    k_acc, v_acc, key, value, table, places, q, grad, lse, delta, first, stride, grad_stride, N, w, scale,
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
    score = _dot(key, tl.trans(query), None, PRECISION) * scale + _load_bias(table, places, i, w, N, 1, RAGGED)
    p = tl.exp2(score * _LOG2E - sums[None, :])
    v_acc = _dot(p.to(gradient.dtype), gradient, v_acc, PRECISION)
    ds = p * (_dot(value, tl.trans(gradient), None, PRECISION) - drift[None, :])
    return _dot(ds.to(query.dtype), query, k_acc, PRECISION), v_acc


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _backward_kv(
    qkv, table, lse, grad, delta, grad_qkv, heads, N, w, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of keys, all queries."""
    tile, head, image = _locate((N + ROWS - 1) // ROWS, heads)
    q, k, v, stride = _split(qkv, image, head, heads, N, D)
    row = (image * heads + head) * N
    grad, lse, delta = grad + (image * N * heads + head) * D, lse + row, delta + row
    middle = _place(N - 1, w)
    j = tile * ROWS + tl.arange(0, ROWS)
    key = _load(k, j, stride, N, D)
    value = _load(v, j, stride, N, D)
    table += head * (2 * middle + 1)
    places = middle - _place(tl.minimum(j, N - 1), w)

    k_acc = tl.full((ROWS, D), 0.0, tl.float32)
    v_acc = tl.full((ROWS, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        k_acc, v_acc = _push(
            k_acc, v_acc, key, value, table, places, q, grad, lse, delta, i, stride, heads * D, N, w, scale,
            D, BLOCK, PRECISION, False,
        )  # fmt: skip
    if whole < N:
        k_acc, v_acc = _push(
            k_acc, v_acc, key, value, table, places, q, grad, lse, delta, whole, stride, heads * D, N, w, scale,
            D, BLOCK, PRECISION, True,
        )  # fmt: skip
    _, grad_k, grad_v, _ = _split(grad_qkv, image, head, heads, N, D)
    at = j[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(grad_k + at, (k_acc * scale).to(grad_k.dtype.element_ty), mask=j[:, None] < N)
    tl.store(grad_v + at, v_acc.to(grad_v.dtype.element_ty), mask=j[:, None] < N)


@triton.jit(do_not_specialize=["images", "share", "run", "heads", "N", "w"])
def _backward_table(
    qkv, table, lse, grad, delta, grad_table, images, share, run, heads, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of (query, key) of all pairs of runs that lie the same number of runs apart, in `share` images.

    A run is one or more rows of the map. Pairs of runs equally far apart read the same entries of the table, so their
    gradients add up in registers. Element (share, head, x, place) of `grad_table` is that of the queries that are the
    x-th of their runs.
    """
    tiles = (run + BLOCK - 1) // BLOCK
    runs = N // run
    tile, shift, plane = _locate(tiles * tiles, 2 * runs - 1)
    head, first = plane % heads, plane // heads * share
    shift -= runs - 1
    begin = tl.maximum(shift, 0) * run
    end = (runs + tl.minimum(shift, 0)) * run
    back = shift * run
    xi = tile // tiles * BLOCK + tl.arange(0, BLOCK)
    xj = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    size = 2 * _place(N - 1, w) + 1
    place = size // 2 + _place(begin + tl.minimum(xi, run - 1), w)[:, None]
    place -= _place(begin - back + tl.minimum(xj, run - 1), w)[None, :]
    bias = tl.load(table + head * size + place)

    acc = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    i = begin
    q, k, v, stride = _split(qkv, first, head, heads, N, D)
    start = tl.zeros((), tl.int64)
    own = (first * N * heads + head) * D
    row = (first * heads + head) * N
    pairs = tl.minimum(share, images - first).to(tl.int32) * (runs - tl.abs(shift))
    for _ in tl.range(pairs, num_stages=STAGES):
        query = _load(q + start + i * stride, xi, stride, run, D)
        key = _load(k + start + (i - back) * stride, xj, stride, run, D)
        value = _load(v + start + (i - back) * stride, xj, stride, run, D)
        gradient = _load(grad + own + i * (heads * D), xi, heads * D, run, D)
        sums = tl.load(lse + row + i + xi, mask=xi < run, other=float("inf"))
        drift = tl.load(delta + row + i + xi, mask=xi < run, other=0.0)
        p = tl.exp2((_dot(query, tl.trans(key), None, PRECISION) * scale + bias) * _LOG2E - sums[:, None])
        acc += p * (_dot(gradient, tl.trans(value), None, PRECISION) - drift[:, None])
        last = i + run == end
        i = tl.where(last, begin, i + run)
        start += tl.where(last, N * stride, 0)
        own += tl.where(last, N * heads * D, 0)
        row += tl.where(last, N * heads, 0)
    at = grad_table + (plane * run + xi[:, None]) * size + place
    tl.store(at, acc, mask=(xi < run)[:, None] & (xj < run)[None, :])


@torch.library.custom_op("litvit::relative_attention", mutates_args=())
def relative_attention(qkv: Tensor, table: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Attention of the tokens of a map of w columns, differentiable; see `litvit.attention.relative_attention`.

    Args:
        qkv: queries, keys and values, (B, N, 3, heads, D), of a type and D that `litvit.attention.relative_attention`
            names.
        table: (heads, 2h - 1, 2w - 1), of any floating type.
        w: columns of the map.

    Returns:
        (B, N, heads, D), and the binary logarithm of every query's sum of exponentials, (B, heads, N) in float32, which
        has no gradient.
    """
    qkv, table = qkv.contiguous(), table.float().contiguous()
    B, N, _, heads, D = qkv.shape
    out, lse = qkv.new_empty((B, N, heads, D)), qkv.new_empty((B, heads, N), dtype=torch.float32)
    rows, block = _tiles(qkv)
    grid = (triton.cdiv(N, rows) * heads * B,)
    with torch.cuda.device_of(qkv):
        _forward[grid](
            qkv, table, out, lse, heads, N, w, D**-0.5, D, ROWS=rows, BLOCK=block, **_options(qkv)
        )  # fmt: skip
    return out, lse


@relative_attention.register_fake
def _(qkv: Tensor, table: Tensor, w: int) -> tuple[Tensor, Tensor]:
    B, N, _, heads, D = qkv.shape
    return qkv.new_empty((B, N, heads, D)), qkv.new_empty((B, heads, N), dtype=torch.float32)


@torch.library.custom_op("litvit::relative_attention_backward", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, w: int) -> tuple[Tensor, Tensor]:
    dtype = table.dtype
    grad, qkv, table = grad.contiguous(), qkv.contiguous(), table.float().contiguous()
    B, N, _, heads, D = qkv.shape
    numbers = (heads, N, w, D**-0.5, D)
    rows, block = _tiles(qkv)
    options = _options(qkv)
    grid = (triton.cdiv(N, rows) * heads * B,)
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    run = _run(B, N // w, w, block, 2**25 // (heads * table[0].numel()))
    table_programs = triton.cdiv(run, block) ** 2 * (2 * (N // run) - 1) * heads
    # Enough programs for a large GPU, of eight images or more.
    share = triton.cdiv(max(B, 1), max(1, min(B // 8, triton.cdiv(512, table_programs))))
    shares = triton.cdiv(B, share)
    grad_table = table.new_zeros((shares, heads, run, *table.shape[1:]))
    # Wide heads leave no room to copy tiles ahead in the shared memory of GPUs but the largest.
    stages = 3 if D * qkv.element_size() <= 128 else 1
    with torch.cuda.device_of(qkv):
        _backward_q[grid](
            qkv, table, out, lse, grad, delta, grad_qkv, *numbers, ROWS=rows, BLOCK=block, **options
        )  # fmt: skip
        _backward_kv[grid](
            qkv, table, lse, grad, delta, grad_qkv, *numbers, ROWS=rows, BLOCK=32, **options
        )  # fmt: skip
        _backward_table[(shares * table_programs,)](
            qkv, table, lse, grad, delta, grad_table, B, share, run, *numbers, BLOCK=block, STAGES=stages, **options
        )  # fmt: skip
    return grad_qkv, grad_table.sum((0, 2)).to(dtype)


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, w: int) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, table, ctx.w = inputs
    ctx.save_for_backward(qkv, table, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.w), None


relative_attention.register_autograd(_differentiate, setup_context=_save)


def _tiles(qkv: Tensor) -> tuple[int, int]:
    """Tokens of a program's own tile, and of those that it goes through: fastest on an H100 for heads of 32."""
    size = qkv.shape[4] * qkv.element_size()
    return 64 if size <= 128 else 32, 64 if size <= 64 else 32


def _options(qkv: Tensor) -> dict[str, int | str]:
    # Copying tiles ahead (num_stages) slows all kernels but one, which asks for it in its loop.
    return {"PRECISION": product_precision(qkv.dtype), "num_warps": 4, "num_stages": 1}


def _run(images: int, h: int, w: int, block: int, limit: int) -> int:
    """Tokens of a run for the gradient of the table: rows of the map that fill tiles well, but no more than `limit`."""

    def cost(rows: int) -> int:
        runs = h // rows
        # Of a tile: pairs of runs, and what its start and end cost beside them.
        return triton.cdiv(rows * w, block) ** 2 * (runs**2 * images + 12 * (2 * runs - 1))

    fitting = [rows for rows in range(1, h + 1) if h % rows == 0 and (rows == 1 or rows * w <= min(limit, 256))]
    return min(fitting, key=cost) * w
