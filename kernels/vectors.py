"""Triton helpers that turn page bytes into vectors, for every preset and head size. Shared by decode and prefill.

``unit`` is a tensor of uint8 pointers to the first byte of each token's 16-token unit, ``token`` its index there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_units(cache, block, position, head, stride_block, stride_head, BLOCK_SIZE: tl.constexpr, UNIT_BYTES: tl.constexpr):
    """``unit`` and ``token`` of positions [N] whose physical blocks are ``block`` [N]."""
    page = cache + block.to(tl.int64) * stride_block + head.to(tl.int64) * stride_head
    return page + position % BLOCK_SIZE // 16 * UNIT_BYTES, (position % 16).to(tl.int32)


@triton.jit
def bucket_of(position, bucket, buckets):
    """Which of a basis's ``buckets`` buckets of ``bucket`` positions each position is in."""
    return tl.minimum(position // bucket, buckets - 1).to(tl.int32)


@triton.jit
def load_rows(rows, place, d, inside, D: tl.constexpr):
    """fp32 [N, DP]: dims ``d`` [DP] where ``inside``, 0 elsewhere, of rows ``place`` [N] of [.., D]; of 1 for all tokens."""
    return tl.load(rows + place[:, None] * D + d[None, :], mask=inside[None, :], other=0.0)


@triton.jit
def load_words(unit, token, live, table, PLANE: tl.constexpr, WP: tl.constexpr):
    """int32 [N, WP]: the words of one plane; 0 where not live or past the plane's last word."""
    WORDS: tl.constexpr = PLANE[0]
    w = tl.arange(0, WP)
    inside = live[:, None] & (w < WORDS)[None, :]
    offset = tl.load(table + PLANE[3] + token[:, None] * WORDS + w[None, :], mask=inside, other=0)
    pointer = unit[:, None] + offset
    if PLANE[2] == 4:
        return tl.load(pointer.to(tl.pointer_type(tl.int32), bitcast=True), mask=inside, other=0)
    elif PLANE[2] == 2:
        return tl.load(pointer.to(tl.pointer_type(tl.int16), bitcast=True), mask=inside, other=0).to(tl.int32)
    else:
        return tl.load(pointer, mask=inside, other=0).to(tl.int32)


@triton.jit
def plane_codes(unit, token, live, table, PLANE: tl.constexpr, N: tl.constexpr, DP: tl.constexpr):
    """int32 [N, DP]: the plane's share of each code."""
    DIMS: tl.constexpr = PLANE[1]
    words = load_words(unit, token, live, table, PLANE, DP // DIMS)
    shifts = table + PLANE[4] + (token % 2)[:, None] * DIMS + tl.arange(0, DIMS)[None, :]
    codes = ((words[:, :, None] >> tl.load(shifts)[:, None, :]) & PLANE[5]) << PLANE[6]
    if PLANE[7] != 0:
        codes |= ((words[:, :, None] >> tl.load(shifts + 2 * DIMS)[:, None, :]) & PLANE[7]) << PLANE[8]
    return tl.reshape(codes, [N, DP])


@triton.jit
def e4m3_to_float(code):
    """fp32 of fp8 e4m3 bytes in int32, by bits: not every GPU that we serve converts fp8."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(code >= 0x80, -value, value)


@triton.jit
def load_scalars(unit, token, live, scalars, D: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr):
    """fp32 [N, DP] (or [N, 1] where one scalar serves the head): each dim's fp16 scalar; 0 where not live."""
    GROUPS: tl.constexpr = D // GROUP
    if GROUPS == 1:
        offset = tl.load(scalars + token)
        pointer = (unit + offset).to(tl.pointer_type(tl.float16), bitcast=True)
        return tl.load(pointer, mask=live, other=0.0).to(tl.float32)[:, None]
    else:
        group = tl.arange(0, DP) // GROUP
        inside = live[:, None] & (group < GROUPS)[None, :]
        offset = tl.load(scalars + token[:, None] * GROUPS + group[None, :], mask=inside, other=0)
        pointer = (unit[:, None] + offset).to(tl.pointer_type(tl.float16), bitcast=True)
        return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_codes(
    unit,
    token,
    live,
    table,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
):
    """int32 [N, DP]: whole codes, all planes together."""
    codes = plane_codes(unit, token, live, table, P0, N, DP)
    if P1[0] != 0:
        codes |= plane_codes(unit, token, live, table, P1, N, DP)
    if P2[0] != 0:
        codes |= plane_codes(unit, token, live, table, P2, N, DP)
    return codes


@triton.jit
def codes_to_vectors(
    codes,
    unit,
    token,
    live,
    scalars,
    levels,
    first,
    second,
    OFFSET: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    DP: tl.constexpr,
):
    """fp32 [N, DP]: what Algorithm 1 gives back, in the basis of storage; finite and 0 where not live.

    OFFSET: keys under a basis, whose scale's sign tells of two means; first, second: what either adds, fp32 of that shape or 0.
    """
    inside = live[:, None] & (tl.arange(0, DP) < D)[None, :]
    if BITS == 32:
        return tl.where(inside, codes.to(tl.float32, bitcast=True), 0.0)
    elif BITS == 8:
        return tl.where(inside, e4m3_to_float(codes) + first, 0.0)
    else:
        level = tl.load(levels + (codes & ((1 << BITS) - 1)))
        scale = load_scalars(unit, token, live, scalars, D, GROUP, DP)
        if OFFSET:
            y = level * tl.abs(scale) + tl.where(scale.to(tl.int32, bitcast=True) < 0, second, first)
        else:
            y = level * scale
        return tl.where(inside, y, 0.0)
