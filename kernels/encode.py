"""Triton helpers that turn vectors into page bytes, for every preset and head size: the store's half of ``kernels.vectors``.

``unit`` is a tensor of uint8 pointers to the first byte of each token's 16-token unit, ``token`` its index there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .vectors import load_rows


@triton.jit
def _beyond(x, live, normal, middle, D: tl.constexpr, PRE: tl.constexpr):
    """bool [BT]: vectors beyond ``middle`` in the direction ``normal``."""
    BK: tl.constexpr = 64 if D % 64 == 0 else 32 if D % 32 == 0 else 16
    acc = tl.zeros([live.shape[0]], tl.float32)
    for k in range(0, D, BK):
        i = k + tl.arange(0, BK)
        a = tl.load(x[:, None] + i[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        acc += tl.sum((a * PRE - (tl.load(middle + i) * PRE)[None, :]) * tl.load(normal + i)[None, :], axis=1)
    return acc > 0


@triton.jit
def _rotate_group(
    x,
    live,
    matrix,
    mean,
    place,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIGNS: tl.constexpr,
    MEAN: tl.constexpr,
    PRE: tl.constexpr,
    group,
):
    """fp32 [BT, GP]: PRE * M (x - mean) on the dims of one group. x: pointers [BT] to the vectors' first element.

    mean: [buckets, D], place: [BT] or [1], which of them is a token's.
    """
    BK: tl.constexpr = 64 if D % 64 == 0 else 32 if D % 32 == 0 else 16
    column = group * GROUP + tl.arange(0, GP)
    inside = (tl.arange(0, GP) < GROUP)[None, :]
    acc = tl.zeros([live.shape[0], GP], tl.float32)
    for k in range(0, D, BK):
        i = k + tl.arange(0, BK)
        a = tl.load(x[:, None] + i[None, :], mask=live[:, None], other=0.0)
        b = tl.load(matrix + column[None, :] * D + i[:, None], mask=inside, other=0.0)
        if MEAN:
            a = a.to(tl.float32) - load_rows(mean, place, i, i < D, D)
        if SIGNS:  # entries +-1: products are exact in the input's own precision
            acc = tl.dot((a.to(tl.float32) * PRE).to(b.dtype), b, acc)
        else:
            # Three products of halves on the tensor cores keep 22 bits, at half the time of the plain product.
            acc = tl.dot(a.to(tl.float32) * PRE, b, acc, input_precision="tf32x3" if MEAN else "ieee")
    if SIGNS:
        acc = acc * (1.0 / tl.sqrt(D * 1.0))
    return acc


@triton.jit
def _quantise(a, factor, inside, LEVELS: tl.constexpr, COUNT: tl.constexpr):
    """Index and level of magnitudes ``a / factor``; level 0 outside the group."""
    index = tl.zeros(a.shape, tl.int32)
    level = tl.zeros(a.shape, tl.float32) + LEVELS[0]
    for i in tl.static_range(1, COUNT):
        up = a > factor * ((LEVELS[i - 1] + LEVELS[i]) * 0.5)
        index += up.to(tl.int32)
        level = tl.where(up, LEVELS[i], level)
    return index, tl.where(inside, level, 0.0)


@triton.jit
def _e4m3_bytes(y):
    """int32 bytes of fp8 e4m3, round to nearest even, saturating; NaN for NaN."""
    a = tl.minimum(tl.abs(y), 448.0)
    bits = a.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = ((a * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(a < 0.015625, tiny, normal) | tl.where(y < 0, 0x80, 0)
    return tl.where(y == y, code, 0x7F)


@triton.jit
def _store_words(codes, unit, token, live, table, PLANE: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, group):
    DIMS: tl.constexpr = PLANE[1]
    WP: tl.constexpr = GP // DIMS
    parts = tl.reshape(codes, [codes.shape[0], WP, DIMS])
    shifts = table + PLANE[4] + (token % 2)[:, None] * DIMS + tl.arange(0, DIMS)[None, :]
    # Fields do not overlap, so the sum of the shifted parts is their union.
    words = tl.sum(((parts >> PLANE[6]) & PLANE[5]) << tl.load(shifts)[:, None, :], axis=2)
    if PLANE[7] != 0:
        words += tl.sum(((parts >> PLANE[8]) & PLANE[7]) << tl.load(shifts + 2 * DIMS)[:, None, :], axis=2)
    w = tl.arange(0, WP)
    inside = live[:, None] & (w < GROUP // DIMS)[None, :]
    offsets = table + PLANE[3] + token[:, None] * PLANE[0] + group * (GROUP // DIMS) + w[None, :]
    target = unit[:, None] + tl.load(offsets, mask=inside, other=0)
    if PLANE[2] == 4:
        tl.store(target.to(tl.pointer_type(tl.int32), bitcast=True), words, mask=inside)
    elif PLANE[2] == 2:
        tl.store(target.to(tl.pointer_type(tl.int16), bitcast=True), words.to(tl.int16), mask=inside)
    else:
        tl.store(target, words.to(tl.uint8), mask=inside)


@triton.jit
def _store_scalar(value, unit, token, live, offsets, GROUPS: tl.constexpr, group):
    target = unit + tl.load(offsets + token * GROUPS + group)
    tl.store(target.to(tl.pointer_type(tl.float16), bitcast=True), value.to(tl.float16), mask=live)


@triton.jit
def store_side(
    x,
    unit,
    token,
    live,
    matrix,
    mean,
    offset,
    normal,
    middle,
    place,
    sketch,
    table,
    scalars,
    norms,
    group,
    BITS: tl.constexpr,
    SKETCH: tl.constexpr,
    LEVELS: tl.constexpr,
    PER_SIGMA: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SIGNS: tl.constexpr,
    BASIS: tl.constexpr,
    PRE: tl.constexpr,
):
    column = tl.arange(0, GP)
    inside = (column < GROUP)[None, :]
    if BITS == 32:
        source = x[:, None] + group * GROUP + column[None, :]
        raw = tl.load(source, mask=live[:, None] & inside, other=0.0).to(tl.float32)
        _store_words(raw.to(tl.int32, bitcast=True), unit, token, live, table, P0, GROUP, GP, group)
    else:
        y = _rotate_group(x, live, matrix, mean, place, D, GROUP, GP, SIGNS, BASIS, PRE, group)
        broken = tl.sum((tl.abs(y) < float("inf")).to(tl.int32), axis=1) < GP
        if BITS == 8:
            bounded = tl.clamp(y, -448.0 * PRE, 448.0 * PRE) * (1.0 / PRE)
            codes = _e4m3_bytes(tl.where(broken[:, None], float("nan"), bounded))
            _store_words(codes, unit, token, live, table, P0, GROUP, GP, group)
        else:
            COUNT: tl.constexpr = 1 << (BITS - 1)
            y = tl.where(broken[:, None], 0.0, y)
            if BASIS:
                near = live & (place == 0)
                if tl.max(near.to(tl.int32), axis=0) > 0:
                    near &= _beyond(x, live, normal, middle, D, PRE)
                    second = tl.load(offset + group * GROUP + column, mask=column < GROUP, other=0.0)
                    y = tl.where(near[:, None], y - second[None, :] * PRE, y)
            top = tl.max(tl.abs(y), axis=1)
            safe = tl.where(top > 0, top, 1.0)
            a = tl.abs(y) / safe[:, None]
            energy = tl.sum(a * a, axis=1)
            unit_level = tl.sqrt(energy / GROUP) / PER_SIGMA
            a = a / tl.where(top > 0, unit_level, 1.0)[:, None]
            best = tl.zeros(top.shape, tl.float32) - 1.0
            factor = tl.zeros(top.shape, tl.float32) + 1.0
            for c in tl.static_range(len(CANDIDATES)):
                _, level = _quantise(a, CANDIDATES[c], inside, LEVELS, COUNT)
                # Both sums in one reduction: each is a barrier of the program.
                dot, norm = tl.split(tl.sum(tl.join(a * level, level * level), axis=1))
                score = dot * dot / norm
                factor = tl.where(score > best, CANDIDATES[c], factor)
                best = tl.maximum(score, best)
            index, level = _quantise(a, factor[:, None], inside, LEVELS, COUNT)
            dot = tl.sum(a * level, axis=1)
            # |y|^2 / <y, c>, in the units that were divided out
            stored = energy / tl.where(top > 0, dot * unit_level, 1.0) * (safe * (1.0 / PRE))
            stored = tl.where(top > 0, tl.minimum(stored, 65504.0), 0.0)
            stored = tl.where(broken, float("nan"), stored)
            codes = index | tl.where(y < 0, COUNT, 0)
            if SKETCH:
                kept = stored.to(tl.float16).to(tl.float32) * PRE
                residual = (y - tl.where(y < 0, -level, level) * kept[:, None]) / safe[:, None]
                residual = tl.where(inside, residual, 0.0)
                row = tl.arange(0, GP)
                s = sketch + column[None, :] * GROUP + row[:, None]
                st = tl.load(s, mask=inside & (row < GROUP)[:, None], other=0.0)
                projected = tl.dot(residual, st, input_precision="ieee")
                codes |= tl.where(projected < 0, 1 << BITS, 0)
                norm = tl.minimum(tl.sqrt(tl.sum(residual * residual, axis=1)) * (safe * (1.0 / PRE)), 65504.0)
                _store_scalar(tl.where(broken, float("nan"), norm), unit, token, live, norms, D // GROUP, group)
            if BASIS:
                stored = tl.where(near, -stored, stored)
            _store_scalar(stored, unit, token, live, scalars, D // GROUP, group)
            _store_words(codes, unit, token, live, table, P0, GROUP, GP, group)
            if P1[0] != 0:
                _store_words(codes, unit, token, live, table, P1, GROUP, GP, group)
            if P2[0] != 0:
                _store_words(codes, unit, token, live, table, P2, GROUP, GP, group)
