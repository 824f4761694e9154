"""Prefill's half of the work on pages: older context decoded, range by range, into a bounded workspace.

FlashAttention reads the workspace; vectors come back in the model's own basis, so raw and decoded parts of a context mix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format import UNIT_TOKENS, PageFormat
from .tables import next_power_of_2, side_tables
from .transform import rotation_matrix, sketch_rotation
from .vectors import codes_to_vectors, load_codes, load_scalars


@triton.jit
def _load_side(
    out,
    unit,
    token,
    live,
    row,
    head,
    out_stride_token,
    out_stride_head,
    matrix,
    sketch_matrix,
    table,
    scalars,
    norms,
    levels,
    BITS: tl.constexpr,
    SKETCH: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    codes = load_codes(unit, token, live, table, P0, P1, P2, BN, DP)
    y = codes_to_vectors(codes, unit, token, live, scalars, levels, BITS, D, GROUP, DP)
    i = tl.arange(0, DP)
    target = out + row.to(tl.int64)[:, None] * out_stride_token + head * out_stride_head
    if BITS == 32:
        tl.store(target + i[None, :], y.to(out.dtype.element_ty), mask=live[:, None] & (i < D)[None, :])
    else:
        if SKETCH:
            signs = tl.where((codes >> BITS) > 0, -1.0, 1.0) * load_scalars(unit, token, live, norms, D, GROUP, DP)
            signs = tl.where(live[:, None] & (i < D)[None, :], signs, 0.0)
        for start in range(0, D, BC):
            c = start + tl.arange(0, BC)
            inside = (i < D)[:, None] & (c < D)[None, :]
            x = tl.dot(y, tl.load(matrix + i[:, None] * D + c[None, :], mask=inside, other=0.0), input_precision="tf32")
            if SKETCH:
                m = tl.load(sketch_matrix + i[:, None] * D + c[None, :], mask=inside, other=0.0)
                x += tl.dot(signs, m, input_precision="tf32")
            tl.store(target + c[None, :], x.to(out.dtype.element_ty), mask=live[:, None] & (c < D)[None, :])


@triton.jit(do_not_specialize=["first", "count"])
def _load_context_kernel(
    key,
    value,
    cache,
    blocks,
    first,
    count,
    matrix,
    sketch_matrix,
    key_table,
    key_scalars,
    key_norms,
    key_levels,
    value_table,
    value_scalars,
    value_levels,
    out_stride_token,
    out_stride_head,
    cache_stride_block,
    cache_stride_head,
    KEY_BITS: tl.constexpr,
    KEY_SKETCH: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    head = tl.program_id(1)
    live = row < count
    n = first + row
    block = tl.load(blocks + n // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    unit = cache + block * cache_stride_block + head.to(tl.int64) * cache_stride_head + n % BLOCK_SIZE // 16 * UNIT_BYTES
    token = n % 16
    if tl.program_id(2) == 0:
        _load_side(
            key, unit, token, live, row, head, out_stride_token, out_stride_head, matrix, sketch_matrix,
            key_table, key_scalars, key_norms, key_levels, KEY_BITS, KEY_SKETCH, K0, K1, K2, D, GROUP, DP, BN, BC,
        )  # fmt: skip
    else:
        _load_side(
            value, unit, token, live, row, head, out_stride_token, out_stride_head, matrix, sketch_matrix,
            value_table, value_scalars, value_scalars, value_levels, VALUE_BITS, False, V0, V1, V2, D, GROUP, DP, BN, BC,
        )  # fmt: skip


def load_context(
    cache: torch.Tensor, blocks: torch.Tensor, first: int, count: int, key: torch.Tensor, value: torch.Tensor, fmt: PageFormat
) -> None:
    """Decodes tokens ``first .. first + count - 1`` of one request into key and value.

    cache: uint8 ``[B, H, N, C]``. blocks: int32 ``[*]``, the request's row of the block table. key, value: floating
    ``[>= count, H, d]`` of equal strides, last dim contiguous; rows below ``count`` are written, in the model's basis.
    """
    _, heads, block_size, slot = cache.shape
    d = fmt.head_size
    assert slot == fmt.slot_bytes and block_size % UNIT_TOKENS == 0 and key.stride() == value.stride() and key.stride(2) == 1
    assert cache.stride(3) == 1 and cache.stride(2) == slot and cache.stride(0) % 16 == 0 and cache.stride(1) % 16 == 0
    assert key.shape[0] >= count and key.shape[1:] == (heads, d) and blocks.stride(0) == 1
    if count <= 0:
        return
    keys, values = (side_tables(fmt, kind, cache.device) for kind in ("key", "value"))
    rotation = rotation_matrix(fmt, cache.device)
    dp = next_power_of_2(d)
    bn = 64 if dp <= 128 else 32 if dp <= 256 else 16
    _load_context_kernel[(triton.cdiv(count, bn), heads, 2)](
        key,
        value,
        cache,
        blocks,
        first,
        count,
        rotation,
        sketch_rotation(fmt, cache.device) if keys.codec.sketch else rotation,
        keys.table,
        keys.scalars,
        keys.norms,
        keys.levels,
        values.table,
        values.scalars,
        values.levels,
        key.stride(0),
        key.stride(1),
        cache.stride(0),
        cache.stride(1),
        KEY_BITS=keys.codec.bits,
        KEY_SKETCH=keys.codec.sketch,
        VALUE_BITS=values.codec.bits,
        K0=keys.planes[0],
        K1=keys.planes[1],
        K2=keys.planes[2],
        V0=values.planes[0],
        V1=values.planes[1],
        V2=values.planes[2],
        D=d,
        GROUP=fmt.scale_group,
        DP=dp,
        BLOCK_SIZE=block_size,
        UNIT_BYTES=fmt.unit_bytes,
        BN=bn,
        BC=min(64, max(16, 16384 // dp)),  # the matrix panel stays within shared memory
        num_warps=4,
        num_stages=1,
    )
