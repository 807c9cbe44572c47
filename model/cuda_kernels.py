"""Kernels in Triton for decoding one token a row: what `model.cuda_decoder` launches, captured in a CUDA graph.

A token's products with the weights are bound by the bytes of the weights, so these stay packed (NF4 with double
quantization as in Dettmers et al. 2023, arXiv 2305.14314; int8 with one scale a row; 16 bits) and are unpacked in
registers. Sums are float32. Attention is split over the keys and merged (Dao et al. 2023, "Flash-Decoding").
Not covered: prompts of many tokens, which are bound by arithmetic and go through PyTorch.
"""

# mypy: ignore-errors
# A kernel's arguments are the tensors it works on: there are many, and splitting them would only hide it.
import triton
import triton.language as tl

BLOCK = 64  # weights that share a scale in NF4
NESTED = 256  # scales that share a scale of their own


@triton.jit
def _halves(packed, like):
    """The two 16-bit numbers in each int32, as float32."""
    low = (packed & 0xFFFF).to(tl.int16).to(like, bitcast=True)
    high = ((packed >> 16) & 0xFFFF).to(tl.int16).to(like, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _scales(at, maxima, levels, outer, offsets, mask):
    """Absolute maxima of NF4 blocks, which are 8-bit levels of a scale of their own."""
    level = tl.load(maxima + at, mask=mask, other=0).to(tl.int32)
    return tl.load(levels + level) * tl.load(outer + at // 256, mask=mask, other=0.0) + tl.load(
        offsets + at // 256, mask=mask, other=0.0
    )


@triton.jit
def _column(total, x, m, M, upper, lower, block, blocks, like, K):
    """`total` and the products with the vector `m`; upper and lower are the weights of both halves of the bytes."""
    where = m * (K // 2) + block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pairs = tl.load(x + where, mask=(block < tl.where(m < M, blocks, 0))[:, None], other=0)
    even, odd = _halves(pairs, like)
    return total + (upper * even[None] + lower * odd[None])


@triton.jit
def _placed(total, found, cols, m):
    """`found` with the sums of `total` in the column `m`."""
    return tl.where((cols == m)[None, :], tl.sum(tl.sum(total, 2), 1)[:, None], found)


@triton.jit
def _nf4(
    x, w, maxima, levels, outer, offsets, code, rows, live, cols, M, like: tl.constexpr, K,
    COLS: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Products of NF4 rows with up to eight vectors: (BN, COLS). A weight is unpacked once for all of them."""
    byte, group, blocks, c = tl.arange(0, 32), tl.arange(0, G), K // 64, tl.program_id(1) * COLS
    t0 = tl.zeros((BN, G, 32), tl.float32)
    t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
    for first in range(0, blocks, G):
        block = first + group
        real = live[:, None] & (block < blocks)[None, :]
        where = rows[:, None, None] * (K // 2) + block[None, :, None] * 32 + byte[None, None, :]
        packed = tl.load(w + where, mask=real[:, :, None], other=0).to(tl.int32)
        scale = _scales(rows[:, None] * blocks + block[None, :], maxima, levels, outer, offsets, real)[:, :, None]
        upper, lower = tl.load(code + (packed >> 4)) * scale, tl.load(code + (packed & 15)) * scale
        t0 = _column(t0, x, c, M, upper, lower, block, blocks, like, K)
        if COLS > 1:
            t1 = _column(t1, x, c + 1, M, upper, lower, block, blocks, like, K)
        if COLS > 2:
            t2 = _column(t2, x, c + 2, M, upper, lower, block, blocks, like, K)
            t3 = _column(t3, x, c + 3, M, upper, lower, block, blocks, like, K)
        if COLS > 4:
            t4 = _column(t4, x, c + 4, M, upper, lower, block, blocks, like, K)
            t5 = _column(t5, x, c + 5, M, upper, lower, block, blocks, like, K)
            t6 = _column(t6, x, c + 6, M, upper, lower, block, blocks, like, K)
            t7 = _column(t7, x, c + 7, M, upper, lower, block, blocks, like, K)
    found = _placed(t0, tl.zeros((BN, COLS), tl.float32), cols, c)
    if COLS > 1:
        found = _placed(t1, found, cols, c + 1)
    if COLS > 2:
        found = _placed(t3, _placed(t2, found, cols, c + 2), cols, c + 3)
    if COLS > 4:
        found = _placed(t5, _placed(t4, found, cols, c + 4), cols, c + 5)
        found = _placed(t7, _placed(t6, found, cols, c + 6), cols, c + 7)
    return found


@triton.jit
def _plain_one(x, w, rows, live, K, BN: tl.constexpr, BK: tl.constexpr):
    """Products of rows of whole numbers or floats with one vector: (BN, 1)."""
    at = tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    for first in range(0, K, BK):
        k = first + at
        weights = tl.load(w + rows[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0)
        total += weights.to(tl.float32) * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)[:, None]


@triton.jit
def _plain_many(x, w, rows, live, cols, M, K, COLS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Products of rows of whole numbers or floats with several vectors: (BN, COLS)."""
    at = tl.arange(0, BK)
    total = tl.zeros((BN, COLS), tl.float32)
    for first in range(0, K, BK):
        k = first + at
        weights = tl.load(w + rows[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0)
        given = tl.load(x + cols[None, :] * K + k[:, None], mask=(cols < M)[None, :] & (k < K)[:, None], other=0.0)
        if w.dtype.element_ty == tl.float32:
            total = tl.dot(weights, given.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(weights.to(given.dtype), given, total)
    return total


@triton.jit
def _rows(
    x, w, maxima, levels, outer, offsets, code, scale, rows, live, cols, M, K, like: tl.constexpr,
    BITS: tl.constexpr, COLS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Products of weight rows with the batch, whatever the weights are stored as; `x` holds pairs at 4 bits."""
    if BITS == 4:
        found = _nf4(x, w, maxima, levels, outer, offsets, code, rows, live, cols, M, like, K, COLS, BN, BK // 64)
    else:
        if COLS == 1:
            found = _plain_one(x, w, rows, live, K, BN, BK)
        else:
            found = _plain_many(x, w, rows, live, cols, M, K, COLS, BN, BK)
        if BITS == 8:
            found *= tl.load(scale + rows, mask=live, other=0.0)[:, None] * (1.0 / 127.0)
    return found


@triton.jit
def _low_rank(t, up, rows, live, cols, M, R, COLS: tl.constexpr, RP: tl.constexpr):
    """What an adapter adds: its second factor `up` (N, R) times the first one's products `t` (M, R)."""
    r = tl.arange(0, RP)
    factor = tl.load(up + rows[:, None] * R + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
    if COLS == 1:
        return tl.sum(factor * tl.load(t + r, mask=r < R, other=0.0)[None, :], 1)[:, None]
    given = tl.load(t + cols[:, None] * R + r[None, :], mask=(cols < M)[:, None] & (r < R)[None, :], other=0.0)
    return tl.sum(factor[:, None, :] * given[None, :, :], 2)


@triton.jit
def _linear(
    x, y, residual, w, maxima, levels, outer, offsets, code, scale, bias, t, up, M, N, K, R,
    BITS: tl.constexpr, COLS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    LORA: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) W^T [+ bias] [+ t up^T] [+ residual]; GATED: W (2 N, K) and y = silu(first) * second.

    At 4 bits `x` is given as int32 (M, K / 2): two 16-bit numbers each.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < N
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    like: tl.constexpr = y.dtype.element_ty
    found = _rows(x, w, maxima, levels, outer, offsets, code, scale, rows, live, cols, M, K, like, BITS, COLS, BN, BK)
    if BIAS:
        found += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)[:, None]
    if LORA:
        found += _low_rank(t, up, rows, live, cols, M, R, COLS, RP)
    if GATED:
        more = rows + N
        other = _rows(
            x, w, maxima, levels, outer, offsets, code, scale, more, live, cols, M, K, like, BITS, COLS, BN, BK
        )
        if BIAS:
            other += tl.load(bias + more, mask=live, other=0.0).to(tl.float32)[:, None]
        if LORA:
            other += _low_rank(t, up, more, live, cols, M, R, COLS, RP)
        found = found * tl.sigmoid(found) * other
    where = cols[None, :] * N + rows[:, None]
    real = live[:, None] & (cols < M)[None, :]
    if RESIDUAL:
        found += tl.load(residual + where, mask=real, other=0.0).to(tl.float32)
    tl.store(y + where, found.to(y.dtype.element_ty), mask=real)


@triton.jit
def _norm(x, weight, y, K, eps, KP: tl.constexpr):
    """RMSNorm of each row (Zhang and Sennrich 2019), as Llama computes it."""
    row, k = tl.program_id(0), tl.arange(0, KP)
    given = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    given *= tl.rsqrt(tl.sum(given * given, 0) / K + eps)
    kind = y.dtype.element_ty
    tl.store(y + row * K + k, given.to(kind) * tl.load(weight + k, mask=k < K, other=0.0).to(kind), mask=k < K)


@triton.jit
def _rotate(qkv, cos, sin, lengths, q, keys, values, CAP, HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr):
    """Rotary positions for queries and keys; keys and values go into the cache (rows, HK, CAP, width) at `lengths`."""
    row, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, HALF)
    width: tl.constexpr = 2 * HALF
    place = tl.load(lengths + row)
    source = qkv + row * (HQ + 2 * HK) * width + head * width + d
    first, second = tl.load(source), tl.load(source + HALF)
    if head < HQ + HK:
        c, s = tl.load(cos + place * HALF + d), tl.load(sin + place * HALF + d)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * c - b * s).to(first.dtype), (b * c + a * s).to(second.dtype)
    if head < HQ:
        out = q + (row * HQ + head) * width + d
    elif head < HQ + HK:
        out = keys + ((row * HK + head - HQ).to(tl.int64) * CAP + place) * width + d
    else:
        out = values + ((row * HK + head - HQ - HK).to(tl.int64) * CAP + place) * width + d
    tl.store(out, first)
    tl.store(out + HALF, second)


@triton.jit
def _attend(
    q, keys, values, lengths, sums, states, scale, CAP,
    WINDOW: tl.constexpr, HK: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of one part of the keys: its weighted values `sums` and (largest score, sum) `states`."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, d, j = tl.arange(0, 16), tl.arange(0, WIDTH), tl.arange(0, BLOCK_KEYS)
    stop = tl.load(lengths + row) + 1
    start = tl.maximum(stop - WINDOW, 0) if WINDOW else stop * 0
    each = tl.cdiv(tl.cdiv(stop - start, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    low = start + part * each
    high = tl.minimum(low + each, stop)
    heads = (row * HK + head) * GROUP + g
    query = tl.load(q + heads[:, None] * WIDTH + d[None, :], mask=(g < GROUP)[:, None], other=0.0)
    base = (row * HK + head).to(tl.int64) * CAP * WIDTH
    most = tl.full((16,), float("-inf"), tl.float32)
    weight = tl.zeros((16,), tl.float32)
    total = tl.zeros((16, WIDTH), tl.float32)
    for first in range(low, high, BLOCK_KEYS):
        at = first + j
        key = tl.load(keys + base + at[None, :] * WIDTH + d[:, None], mask=(at < high)[None, :], other=0.0)
        scores = tl.where((at < high)[None, :], tl.dot(query, key, input_precision="ieee") * scale, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        odds, less = tl.exp(scores - highest[:, None]), tl.exp(most - highest)
        value = tl.load(values + base + at[:, None] * WIDTH + d[None, :], mask=(at < high)[:, None], other=0.0)
        total = tl.dot(odds.to(value.dtype), value, total * less[:, None], input_precision="ieee")
        weight, most = weight * less + tl.sum(odds, 1), highest
    where = heads * SPLITS + part
    tl.store(sums + where[:, None] * WIDTH + d[None, :], total, mask=(g < GROUP)[:, None])
    tl.store(states + where * 2, most, mask=g < GROUP)
    tl.store(states + where * 2 + 1, weight, mask=g < GROUP)


@triton.jit
def _merge(sums, states, out, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """The parts of `attend` put together, one head of one row a program."""
    head, d, part = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    most = tl.load(states + (head * SPLITS + part) * 2)
    weight = tl.load(states + (head * SPLITS + part) * 2 + 1)
    share = tl.exp(most - tl.max(most, 0))
    values = tl.load(sums + (head * SPLITS + part)[:, None] * WIDTH + d[None, :])
    found = tl.sum(values * share[:, None], 0) / tl.sum(weight * share, 0)
    tl.store(out + head * WIDTH + d, found.to(out.dtype.element_ty))


# Launched as kernel[grid](...), never called: their arguments are tensors and numbers as the docstrings say.
linear, norm, rotate, attend, merge = _linear, _norm, _rotate, _attend, _merge
