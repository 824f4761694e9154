"""Prefill's half of the work on pages: older context decoded, range by range, into a bounded workspace.

FlashAttention reads the workspace; vectors come back in the model's own basis, so raw and decoded parts of a context mix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .basis import KeyBasis
from .format import PageFormat
from .tables import check_context, level_arguments, next_power_of_2, page_arguments
from .transform import key_matrix, rotation_matrix, sketch_key_matrix
from .vectors import bucket_of, codes_to_vectors, load_codes, load_rows, load_scalars, token_units


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
    mean,
    offset,
    place,
    table,
    scalars,
    norms,
    levels,
    BASIS: tl.constexpr,
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
    i = tl.arange(0, DP)
    second = 0.0
    if BASIS:
        second = tl.load(offset + i, mask=i < D, other=0.0)[None, :]
    y = codes_to_vectors(codes, unit, token, live, scalars, levels, 0.0, second, BASIS, BITS, D, GROUP, DP)
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
            if BASIS:
                x += load_rows(mean, place, c, c < D, D)
            tl.store(target + c[None, :], x.to(out.dtype.element_ty), mask=live[:, None] & (c < D)[None, :])


@triton.jit(do_not_specialize=["table_stride", "bucket", "buckets"])
def _load_context_kernel(
    key,
    value,
    cache,
    block_table,
    first,
    start_loc,
    table_stride,
    bucket,
    buckets,
    key_matrix,
    sketch_matrix,
    mean,
    offset,
    value_matrix,
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
    BASIS: tl.constexpr,
    BUCKETS: tl.constexpr,
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
    head, request = tl.program_id(1), tl.program_id(2) // 2
    start = tl.load(start_loc + request)
    index = tl.program_id(0) * BN + tl.arange(0, BN)
    row = start + index
    live = row < tl.load(start_loc + request + 1)
    n = tl.load(first + request) + index
    block = tl.load(block_table + request.to(tl.int64) * table_stride + n // BLOCK_SIZE, mask=live, other=0)
    unit, token = token_units(cache, block, n, head, cache_stride_block, cache_stride_head, BLOCK_SIZE, UNIT_BYTES)
    if tl.program_id(2) % 2 == 0:
        if BASIS:
            key_matrix += head * D * D
            sketch_matrix += head * D * D
            mean += head * buckets * D
            offset += head * D
        place = tl.zeros([1], tl.int32)
        if BUCKETS:
            place = bucket_of(n, bucket, buckets)
        _load_side(
            key, unit, token, live, row, head, out_stride_token, out_stride_head, key_matrix, sketch_matrix, mean, offset,
            place, key_table, key_scalars, key_norms, key_levels, BASIS, KEY_BITS, KEY_SKETCH, K0, K1, K2, D, GROUP, DP, BN, BC,
        )  # fmt: skip
    else:
        _load_side(
            value, unit, token, live, row, head, out_stride_token, out_stride_head, value_matrix, value_matrix, mean, offset, 0,
            value_table, value_scalars, value_scalars, value_levels, False, VALUE_BITS, False, V0, V1, V2, D, GROUP, DP, BN, BC,
        )  # fmt: skip


def load_context(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    first: torch.Tensor,
    start_loc: torch.Tensor,
    longest: int,
    key: torch.Tensor,
    value: torch.Tensor,
    fmt: PageFormat,
    basis: KeyBasis | None = None,
) -> None:
    """Decodes one range of tokens a request: ``first[r], first[r] + 1, ...`` into rows ``start_loc[r] .. start_loc[r + 1] - 1``.

    cache: uint8 ``[B, H, N, C]``. block_table: int32 ``[R, *]``, last dim contiguous. first: int32 ``[R]``. start_loc: int32 ``[R
    + 1]``. Both are read on the device, where lengths are exact; ``longest`` is the host's bound of a range. key, value:
    floating ``[rows, H, d]`` of equal strides, last dim contiguous; written in the model's basis. basis: that of the store, on
    the same device.
    """
    heads, d = key.shape[1:]
    check_context(cache, block_table, first, start_loc, key, value, fmt)
    requests = first.shape[0]
    if longest <= 0 or requests == 0:
        return
    keys = key_matrix(fmt, cache.device, basis)
    dp = next_power_of_2(d)
    bn = 64 if dp <= 128 else 32 if dp <= 256 else 16
    _load_context_kernel[(triton.cdiv(longest, bn), heads, 2 * requests)](
        key,
        value,
        block_table=block_table,
        first=first,
        start_loc=start_loc,
        table_stride=block_table.stride(0),
        key_matrix=keys,
        sketch_matrix=sketch_key_matrix(fmt, cache.device, basis) if fmt.preset.key.sketch else keys,
        mean=None if basis is None else basis.means,
        offset=None if basis is None else basis.offset,
        bucket=1 if basis is None else basis.bucket,
        buckets=1 if basis is None else basis.buckets,
        value_matrix=rotation_matrix(fmt, cache.device),
        BASIS=basis is not None and fmt.preset.key.bits != 32,
        BUCKETS=basis is not None and basis.buckets > 1,
        out_stride_token=key.stride(0),
        out_stride_head=key.stride(1),
        DP=dp,
        BN=bn,
        BC=min(64, max(16, 16384 // dp)),  # the matrix panel stays within shared memory
        num_warps=4,
        num_stages=1,
        **page_arguments(cache, fmt),
        **level_arguments(cache, fmt),
    )
