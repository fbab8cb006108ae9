"""Triton kernels of attention with a relative position bias, forward and backward, that write no N x N tensor.

Shape letters: B images, (h, w) map, N = h*w tokens, D channels per head. Other letters are those of FlashAttention (Dao
et al., 2022): m_i and l_i, running maximum and sum of exponentials of query i; lse, logarithm of the final sum; p,
softmax weights; ds, gradient of the scores; delta, product of output and its gradient; do, dq, dk, dv, gradients.

Token i of a map has position y*(2w - 1) + x in the table's reading order. The bias of query i and key j is the table's
entry at position(i) - position(j) + position(N - 1). Statistics of the softmax, all sums and the bias are float32 for
any type of tokens. Every sum has a fixed order, so two runs give the same numbers.
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
def _table_position(token, w):
    # token // w by the reciprocal in units of 2**-32, exact while token * w < 2**32: a division is far slower.
    reciprocal = tl.full((), 0xFFFFFFFF, tl.uint32) // w.to(tl.uint32) + 1
    return token + tl.umulhi(token.to(tl.uint32), reciprocal).to(tl.int32) * (w - 1)


@triton.jit
def _load(x, tokens, stride, end, D: tl.constexpr, RAGGED: tl.constexpr = True):
    """Load tokens as (tokens, D). If RAGGED, those from `end` on are zero."""
    pointers = x + tokens[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=tokens[:, None] < end, other=0.0) if RAGGED else tl.load(pointers)


@triton.jit
def _load_bias(table, positions, tokens, w, end, SIGN: tl.constexpr, RAGGED: tl.constexpr):
    """Load the table's entries at `positions` plus (SIGN 1) or minus (SIGN -1) the positions of `tokens`."""
    if RAGGED:
        tokens = tl.minimum(tokens, end - 1)
    return _gather(table, positions, SIGN * _table_position(tokens, w))


@triton.jit
def _gather(table, rows, columns):
    """Load the float32 entries at rows[:, None] + columns[None, :]."""
    if _INTERPRETED:
        return tl.load(table + (rows[:, None] + columns[None, :]))
    # tl.load would send every entry through shared memory. These loads go straight to the registers that use them.
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
def _program_indices(tiles, heads):
    """Return tile, head and image of this program."""
    image_head = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, image_head % heads, (image_head // heads).to(tl.int64)


@triton.jit
def _qkv_pointers(qkv, image, head, heads, N, D: tl.constexpr):
    """Return pointers to q, k and v of token 0 of an image and head, and the stride of tokens."""
    q_ptr = qkv + (image * N * 3 * heads + head) * D
    return q_ptr, q_ptr + heads * D, q_ptr + 2 * heads * D, 3 * heads * D


@triton.jit
def _fwd_inner(
    m_i, l_i, acc, q, table, positions, k_ptr, v_ptr, start, stride, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Update maximum, sum of exponentials and weighted sum of values of a tile of queries by a block of keys."""
    j = start + tl.arange(0, BLOCK)
    k = _load(k_ptr, j, stride, N, D, RAGGED)
    v = _load(v_ptr, j, stride, N, D, RAGGED)
    score = _dot(q, tl.trans(k), None, PRECISION) * scale + _load_bias(table, positions, j, w, N, -1, RAGGED)
    if RAGGED:
        score = tl.where((j < N)[None, :], score, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(score, 1) * _LOG2E)
    p = tl.exp2(score * _LOG2E - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    acc = _dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
    return m_new, l_i * alpha + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _fwd(
    qkv, table, out, lse, heads, N, w, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the output of one tile of queries and all keys."""
    tile, head, image = _program_indices((N + ROWS - 1) // ROWS, heads)
    q_ptr, k_ptr, v_ptr, stride = _qkv_pointers(qkv, image, head, heads, N, D)
    center = _table_position(N - 1, w)
    i = tile * ROWS + tl.arange(0, ROWS)
    q = _load(q_ptr, i, stride, N, D)
    table += head * (2 * center + 1)
    positions = center + _table_position(tl.minimum(i, N - 1), w)

    m_i = tl.full((ROWS,), float("-inf"), tl.float32)
    l_i = tl.full((ROWS,), 0.0, tl.float32)
    acc = tl.full((ROWS, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for j in range(0, whole, BLOCK):
        m_i, l_i, acc = _fwd_inner(
            m_i, l_i, acc, q, table, positions, k_ptr, v_ptr, j, stride, N, w, scale, D, BLOCK, PRECISION, False
        )  # fmt: skip
    if whole < N:
        m_i, l_i, acc = _fwd_inner(
            m_i, l_i, acc, q, table, positions, k_ptr, v_ptr, whole, stride, N, w, scale, D, BLOCK, PRECISION, True
        )  # fmt: skip

    pointers = out + (image * N * heads + head) * D + i[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    tl.store(pointers, (acc / l_i[:, None]).to(out.dtype.element_ty), mask=i[:, None] < N)
    tl.store(lse + (image * heads + head) * N + i, m_i + tl.log2(l_i), mask=i < N)


@triton.jit
def _bwd_dq_inner(
    dq, q, do, lse_i, delta_i, table, positions, k_ptr, v_ptr, start, stride, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add to dq of a tile of queries what a block of keys contributes."""
    j = start + tl.arange(0, BLOCK)
    k = _load(k_ptr, j, stride, N, D, RAGGED)
    v = _load(v_ptr, j, stride, N, D, RAGGED)
    score = _dot(q, tl.trans(k), None, PRECISION) * scale + _load_bias(table, positions, j, w, N, -1, RAGGED)
    p = tl.exp2(score * _LOG2E - lse_i[:, None])
    if RAGGED:
        p = tl.where((j < N)[None, :], p, 0.0)
    ds = p * (_dot(do, tl.trans(v), None, PRECISION) - delta_i[:, None])
    return _dot(ds.to(k.dtype), k, dq, PRECISION)


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _bwd_dq(
    qkv, table, out, lse, dout, delta, dqkv, heads, N, w, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq of one tile of queries and all keys, and delta of these queries."""
    tile, head, image = _program_indices((N + ROWS - 1) // ROWS, heads)
    q_ptr, k_ptr, v_ptr, stride = _qkv_pointers(qkv, image, head, heads, N, D)
    out_start = (image * N * heads + head) * D
    row_start = (image * heads + head) * N
    center = _table_position(N - 1, w)
    i = tile * ROWS + tl.arange(0, ROWS)
    q = _load(q_ptr, i, stride, N, D)
    do = _load(dout + out_start, i, heads * D, N, D)
    o = _load(out + out_start, i, heads * D, N, D)
    table += head * (2 * center + 1)
    positions = center + _table_position(tl.minimum(i, N - 1), w)
    lse_i = tl.load(lse + row_start + i, mask=i < N, other=float("inf"))
    delta_i = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row_start + i, delta_i, mask=i < N)

    dq = tl.full((ROWS, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for j in range(0, whole, BLOCK):
        dq = _bwd_dq_inner(
            dq, q, do, lse_i, delta_i, table, positions, k_ptr, v_ptr, j, stride, N, w, scale,
            D, BLOCK, PRECISION, False,
        )  # fmt: skip
    if whole < N:
        dq = _bwd_dq_inner(
            dq, q, do, lse_i, delta_i, table, positions, k_ptr, v_ptr, whole, stride, N, w, scale,
            D, BLOCK, PRECISION, True,
        )  # fmt: skip
    dq_ptr = _qkv_pointers(dqkv, image, head, heads, N, D)[0]
    offsets = i[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + offsets, (dq * scale).to(dqkv.dtype.element_ty), mask=i[:, None] < N)


@triton.jit
def _bwd_dkdv_inner(
    dk, dv, k, v, table, positions, q_ptr, do_ptr, lse, delta, start, stride, do_stride, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv of a tile of keys what a block of queries contributes."""
    i = start + tl.arange(0, BLOCK)
    q = _load(q_ptr, i, stride, N, D, RAGGED)
    do = _load(do_ptr, i, do_stride, N, D, RAGGED)
    if RAGGED:
        # An infinite lse makes p zero.
        lse_i = tl.load(lse + i, mask=i < N, other=float("inf"))
        delta_i = tl.load(delta + i, mask=i < N, other=0.0)
    else:
        lse_i = tl.load(lse + i)
        delta_i = tl.load(delta + i)
    score = _dot(k, tl.trans(q), None, PRECISION) * scale + _load_bias(table, positions, i, w, N, 1, RAGGED)
    p = tl.exp2(score * _LOG2E - lse_i[None, :])
    dv = _dot(p.to(do.dtype), do, dv, PRECISION)
    ds = p * (_dot(v, tl.trans(do), None, PRECISION) - delta_i[None, :])
    return _dot(ds.to(q.dtype), q, dk, PRECISION), dv


@triton.jit(do_not_specialize=["heads", "N", "w"])
def _bwd_dkdv(
    qkv, table, lse, dout, delta, dqkv, heads, N, w, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys and all queries."""
    tile, head, image = _program_indices((N + ROWS - 1) // ROWS, heads)
    q_ptr, k_ptr, v_ptr, stride = _qkv_pointers(qkv, image, head, heads, N, D)
    row_start = (image * heads + head) * N
    do_ptr, lse, delta = dout + (image * N * heads + head) * D, lse + row_start, delta + row_start
    center = _table_position(N - 1, w)
    j = tile * ROWS + tl.arange(0, ROWS)
    k = _load(k_ptr, j, stride, N, D)
    v = _load(v_ptr, j, stride, N, D)
    table += head * (2 * center + 1)
    positions = center - _table_position(tl.minimum(j, N - 1), w)

    dk = tl.full((ROWS, D), 0.0, tl.float32)
    dv = tl.full((ROWS, D), 0.0, tl.float32)
    whole = N // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        dk, dv = _bwd_dkdv_inner(
            dk, dv, k, v, table, positions, q_ptr, do_ptr, lse, delta, i, stride, heads * D, N, w, scale,
            D, BLOCK, PRECISION, False,
        )  # fmt: skip
    if whole < N:
        dk, dv = _bwd_dkdv_inner(
            dk, dv, k, v, table, positions, q_ptr, do_ptr, lse, delta, whole, stride, heads * D, N, w, scale,
            D, BLOCK, PRECISION, True,
        )  # fmt: skip
    _, dk_ptr, dv_ptr, _ = _qkv_pointers(dqkv, image, head, heads, N, D)
    offsets = j[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + offsets, (dk * scale).to(dqkv.dtype.element_ty), mask=j[:, None] < N)
    tl.store(dv_ptr + offsets, dv.to(dqkv.dtype.element_ty), mask=j[:, None] < N)


@triton.jit(do_not_specialize=["images", "images_per_program", "group_size", "heads", "N", "w"])
def _bwd_dtable(
    qkv, table, lse, dout, delta, dtable, images, images_per_program, group_size, heads, N, w, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what pairs of row groups with the same offset contribute to the table's gradient.

    A row group is one or more rows of the map. The pairs of query group and key group that are equally far apart read
    the same entries of the table, so their gradients add up in registers. A program takes one tile of (query, key) of
    all these pairs in `images_per_program` images. Element (image block, head, x, position) of `dtable` is the sum over
    the queries at index x of their groups.
    """
    tiles = (group_size + BLOCK - 1) // BLOCK
    groups = N // group_size
    tile, group_offset, block_head = _program_indices(tiles * tiles, 2 * groups - 1)
    head, first_image = block_head % heads, block_head // heads * images_per_program
    group_offset -= groups - 1
    begin = tl.maximum(group_offset, 0) * group_size
    end = (groups + tl.minimum(group_offset, 0)) * group_size
    token_offset = group_offset * group_size
    xi = tile // tiles * BLOCK + tl.arange(0, BLOCK)
    xj = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    size = 2 * _table_position(N - 1, w) + 1
    positions = size // 2 + _table_position(begin + tl.minimum(xi, group_size - 1), w)[:, None]
    positions -= _table_position(begin - token_offset + tl.minimum(xj, group_size - 1), w)[None, :]
    bias = tl.load(table + head * size + positions)

    acc = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    i = begin
    q_ptr, k_ptr, v_ptr, stride = _qkv_pointers(qkv, first_image, head, heads, N, D)
    qkv_start = tl.zeros((), tl.int64)
    out_start = (first_image * N * heads + head) * D
    row_start = (first_image * heads + head) * N
    pairs = tl.minimum(images_per_program, images - first_image).to(tl.int32) * (groups - tl.abs(group_offset))
    for _ in tl.range(pairs, num_stages=STAGES):
        q = _load(q_ptr + qkv_start + i * stride, xi, stride, group_size, D)
        k = _load(k_ptr + qkv_start + (i - token_offset) * stride, xj, stride, group_size, D)
        v = _load(v_ptr + qkv_start + (i - token_offset) * stride, xj, stride, group_size, D)
        do = _load(dout + out_start + i * (heads * D), xi, heads * D, group_size, D)
        lse_i = tl.load(lse + row_start + i + xi, mask=xi < group_size, other=float("inf"))
        delta_i = tl.load(delta + row_start + i + xi, mask=xi < group_size, other=0.0)
        p = tl.exp2((_dot(q, tl.trans(k), None, PRECISION) * scale + bias) * _LOG2E - lse_i[:, None])
        acc += p * (_dot(do, tl.trans(v), None, PRECISION) - delta_i[:, None])
        last = i + group_size == end
        i = tl.where(last, begin, i + group_size)
        qkv_start += tl.where(last, N * stride, 0)
        out_start += tl.where(last, N * heads * D, 0)
        row_start += tl.where(last, N * heads, 0)
    pointers = dtable + (block_head * group_size + xi[:, None]) * size + positions
    tl.store(pointers, acc, mask=(xi < group_size)[:, None] & (xj < group_size)[None, :])


@torch.library.custom_op("litvit::relative_attention", mutates_args=())
def relative_attention(qkv: Tensor, table: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Compute attention of the tokens of a map of w columns, see `litvit.attention.relative_attention`.

    Args:
        qkv: Queries, keys and values, (B, N, 3, heads, D), of a type and D that `litvit.attention.relative_attention`
            names.
        table: Relative position table, (heads, 2h - 1, 2w - 1), of any floating type.
        w: Number of columns of the map.

    Returns:
        Output, (B, N, heads, D), which is differentiable, and lse, the binary logarithm of each query's sum of
        exponentials, (B, heads, N) in float32, which has no gradient.
    """
    qkv, table = qkv.contiguous(), table.float().contiguous()
    B, N, _, heads, D = qkv.shape
    out, lse = qkv.new_empty((B, N, heads, D)), qkv.new_empty((B, heads, N), dtype=torch.float32)
    rows, block = _tiles(qkv)
    grid = (triton.cdiv(N, rows) * heads * B,)
    with torch.cuda.device_of(qkv):
        _fwd[grid](
            qkv, table, out, lse, heads, N, w, D**-0.5, D, ROWS=rows, BLOCK=block, **_options(qkv)
        )  # fmt: skip
    return out, lse


@relative_attention.register_fake
def _(qkv: Tensor, table: Tensor, w: int) -> tuple[Tensor, Tensor]:
    B, N, _, heads, D = qkv.shape
    return qkv.new_empty((B, N, heads, D)), qkv.new_empty((B, heads, N), dtype=torch.float32)


@torch.library.custom_op("litvit::relative_attention_backward", mutates_args=())
def _backward(dout: Tensor, qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, w: int) -> tuple[Tensor, Tensor]:
    dtype = table.dtype
    dout, qkv, table = dout.contiguous(), qkv.contiguous(), table.float().contiguous()
    B, N, _, heads, D = qkv.shape
    sizes = (heads, N, w, D**-0.5, D)
    rows, block = _tiles(qkv)
    options = _options(qkv)
    grid = (triton.cdiv(N, rows) * heads * B,)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    group_size = _group_size(B, N // w, w, block, 2**25 // (heads * table[0].numel()))
    programs = triton.cdiv(group_size, block) ** 2 * (2 * (N // group_size) - 1) * heads
    # Enough programs for a large GPU, each of eight images or more.
    images_per_program = triton.cdiv(max(B, 1), max(1, min(B // 8, triton.cdiv(512, programs))))
    image_blocks = triton.cdiv(B, images_per_program)
    dtable = table.new_zeros((image_blocks, heads, group_size, *table.shape[1:]))
    # With wide heads only the largest GPUs have shared memory for copying tiles ahead.
    stages = 3 if D * qkv.element_size() <= 128 else 1
    with torch.cuda.device_of(qkv):
        _bwd_dq[grid](
            qkv, table, out, lse, dout, delta, dqkv, *sizes, ROWS=rows, BLOCK=block, **options
        )  # fmt: skip
        _bwd_dkdv[grid](
            qkv, table, lse, dout, delta, dqkv, *sizes, ROWS=rows, BLOCK=32, **options
        )  # fmt: skip
        _bwd_dtable[(image_blocks * programs,)](
            qkv, table, lse, dout, delta, dtable, B, images_per_program, group_size, *sizes,
            BLOCK=block, STAGES=stages, **options,
        )  # fmt: skip
    return dqkv, dtable.sum((0, 2)).to(dtype)


@_backward.register_fake
def _(dout: Tensor, qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, w: int) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, table, ctx.w = inputs
    ctx.save_for_backward(qkv, table, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors, ctx.w), None


relative_attention.register_autograd(_differentiate, setup_context=_save)


def _tiles(qkv: Tensor) -> tuple[int, int]:
    """Return the tokens of a program's own tile and of the blocks it loops over, fastest on an H100 for heads of 32."""
    size = qkv.shape[4] * qkv.element_size()
    return 64 if size <= 128 else 32, 64 if size <= 64 else 32


def _options(qkv: Tensor) -> dict[str, int | str]:
    # Copying tiles ahead (num_stages) slows all kernels but _bwd_dtable, which asks for it in its loop.
    return {"PRECISION": product_precision(qkv.dtype), "num_warps": 4, "num_stages": 1}


def _group_size(images: int, h: int, w: int, block: int, limit: int) -> int:
    """Return the tokens of a row group for the table's gradient: rows that fill tiles well, with `limit` at most."""

    def cost(rows: int) -> int:
        groups = h // rows
        # Per tile: pairs of groups, and the start and end of a program, which cost about as much as 12 pairs.
        return triton.cdiv(rows * w, block) ** 2 * (groups**2 * images + 12 * (2 * groups - 1))

    fitting = [rows for rows in range(1, h + 1) if h % rows == 0 and (rows == 1 or rows * w <= min(limit, 256))]
    return min(fitting, key=cost) * w
