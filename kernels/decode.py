"""Portable decode: attention of a few query tokens a request over compressed pages, split over the context.

Every preset, head size and group size; query lengths up to ``max_query_len`` (speculative verification), causal among
themselves; sliding window, sinks, soft cap. Lengths are read on the device and the grid depends on shapes alone, so a
captured graph replays with other lengths and tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .basis import KeyBasis
from .combine import combine, plan_decode
from .format import PageFormat
from .softmax import add_scores, cap_scores
from .tables import check_pages, level_arguments, next_power_of_2, page_arguments
from .transform import key_matrix, rotation_matrix, sketch_key_matrix, transform_rows
from .vectors import bucket_of, codes_to_vectors, load_codes, load_rows, load_scalars, token_units

_ROWS = 64  # query rows a program holds at most


@triton.jit(do_not_specialize=["table_stride", "bucket", "buckets", "kv_heads", "q_per_kv", "max_query_len", "splits"])
def _decode_kernel(
    q,
    q_sketch,
    partial,
    partial_max,
    partial_sum,
    cache,
    block_table,
    seq_lens,
    query_start_loc,
    ends,
    key_table,
    key_scalars,
    key_norms,
    key_levels,
    value_table,
    value_scalars,
    value_levels,
    offset,
    offsets,
    cache_stride_block,
    cache_stride_head,
    table_stride,
    bucket,
    buckets,
    scale,
    soft_cap,
    kv_heads,
    q_per_kv,
    max_query_len,
    splits,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    RECENT: tl.constexpr,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split, head = tl.program_id(0), tl.program_id(1)
    rows = q_per_kv * max_query_len
    row_blocks = tl.cdiv(rows, BM)
    request, row_block = tl.program_id(2) // row_blocks, tl.program_id(2) % row_blocks
    length = tl.load(seq_lens + request)
    q_start = tl.load(query_start_loc + request)
    q_len = tl.minimum(tl.load(query_start_loc + request + 1) - q_start, max_query_len)

    row = row_block * BM + tl.arange(0, BM)
    query, member = row // q_per_kv, row % q_per_kv
    asked = (query < q_len) & (row < rows)
    position = length - q_len + query
    d = tl.arange(0, DP)
    source = ((q_start + query).to(tl.int64) * kv_heads + head) * q_per_kv + member
    q_mask = asked[:, None] & (d < D)[None, :]
    q_rows = tl.load(q + source[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    if KEY_SKETCH:
        q_sketch_rows = tl.load(q_sketch + source[:, None] * D + d[None, :], mask=q_mask, other=0.0)

    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - q_len - WINDOW + 1, 0) // 16 * 16
    stop = length
    if RECENT:
        stop = tl.minimum(length, tl.load(ends + request))
    tiles = tl.cdiv(tl.maximum(stop - first, 0), BN)
    share = tl.cdiv(tiles, splits)
    begin = first + split * share * BN
    end = tl.minimum(begin + share * BN, stop)

    # What stored keys are short of, by their scale's sign: `KeyBasis.offsets` of the bucket, or `KeyBasis.offset`.
    second = 0.0
    if BASIS:
        second = tl.load(offset + head * D + d, mask=d < D, other=0.0)[None, :]
        offsets += head * buckets * D
    peak = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for start in range(begin, end, BN):
        n = start + tl.arange(0, BN)
        live = n < end
        block = tl.load(block_table + request.to(tl.int64) * table_stride + n // BLOCK_SIZE, mask=live, other=0)
        unit, token = token_units(cache, block, n, head, cache_stride_block, cache_stride_head, BLOCK_SIZE, UNIT_BYTES)
        codes = load_codes(unit, token, live, key_table, K0, K1, K2, BN, DP)
        nearer = 0.0
        if BUCKETS:
            nearer = load_rows(offsets, bucket_of(n, bucket, buckets), d, d < D, D)
        k = codes_to_vectors(codes, unit, token, live, key_scalars, key_levels, nearer, second, BASIS, KEY_BITS, D, GROUP, DP)
        scores = tl.dot(q_rows, tl.trans(k), input_precision=PRECISION)
        if KEY_SKETCH:
            signs = tl.where((codes >> KEY_BITS) > 0, -1.0, 1.0) * load_scalars(unit, token, live, key_norms, D, GROUP, DP)
            signs = tl.where(live[:, None] & (d < D)[None, :], signs, 0.0)
            scores += tl.dot(q_sketch_rows, tl.trans(signs), input_precision=PRECISION)
        scores *= scale
        if SOFT_CAP:
            scores = cap_scores(scores, soft_cap)
        visible = live[None, :] & (n[None, :] <= position[:, None]) & asked[:, None]
        if WINDOW > 0:
            visible &= n[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, -float("inf"))
        weights, shrink, peak, total = add_scores(scores, peak, total)
        codes = load_codes(unit, token, live, value_table, V0, V1, V2, BN, DP)
        v = codes_to_vectors(codes, unit, token, live, value_scalars, value_levels, 0.0, 0.0, False, VALUE_BITS, D, GROUP, DP)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)

    part = ((request.to(tl.int64) * kv_heads + head) * rows + row) * splits + split
    tl.store(partial + part[:, None] * D + d[None, :], acc, mask=q_mask)
    tl.store(partial_max + part, peak, mask=asked)
    tl.store(partial_sum + part, total, mask=asked)


def _precision(fmt: PageFormat, dtype: torch.dtype) -> str:
    """tf32 keeps 10 mantissa bits: above bf16's rounding, below fp16's, for which three tf32 products stand in."""
    if fmt.preset.key.bits == 32:
        return "ieee"
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    fmt: PageFormat,
    scale: float,
    max_query_len: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    basis: KeyBasis | None = None,
    ends: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Attention of the last ``query_start_loc[r + 1] - query_start_loc[r]`` (at most ``max_query_len``) tokens of each request.

    query: floating ``[T, Hq, d]``. cache: uint8 ``[B, Hk, N, C]``. block_table: int32 ``[R, *]``; entries past a length are
    never read. seq_lens: int32 ``[R]``, query tokens included. query_start_loc: int32 ``[R + 1]``. out: floating ``[T, Hq, d]``,
    rows of requests are written. scratch: fp32, at least ``plan_decode(...).floats`` elements, contents free. basis: that of the
    store, on the same device; without mean where there are sinks or a soft cap. ends: int32 ``[R]`` or longer: tokens at
    positions ``ends[r]`` and later are left out and their pages not read, for `recent_attend`; then the natural logarithm of the
    sum of each row's softmax, sinks included, is written to ``lse``, fp32 ``[T, Hq]`` contiguous. Rows that are left without a
    token are 0, their lse is that of the sinks, -1e29 or less without.
    """
    tokens, heads, d = query.shape
    kv_heads = cache.shape[1]
    requests = seq_lens.shape[0]
    check_pages(cache, fmt, kv_heads)
    assert d == fmt.head_size and heads % kv_heads == 0
    assert query.stride(2) == 1 and out.stride(2) == 1 and block_table.stride(1) == 1 and scratch.dtype == torch.float32
    assert (ends is None) == (lse is None)
    plan = plan_decode(requests, tokens, heads, kv_heads, d, max_query_len)
    sizes = [tokens * heads * d] * 3 + [plan.rows * d, plan.rows, plan.rows]
    q, q_sketch, rotated, partial, partial_max, partial_sum = scratch[: plan.floats].split(sizes)
    transform_rows(query, q.view(query.shape), key_matrix(fmt, cache.device, basis), transpose=True)
    if fmt.preset.key.sketch:
        transform_rows(query, q_sketch.view(query.shape), sketch_key_matrix(fmt, cache.device, basis), transpose=True)
    dp, group = next_power_of_2(d), heads // kv_heads
    rows = group * max_query_len
    bm = min(_ROWS if dp <= 128 else 32 if dp <= 256 else 16, max(16, next_power_of_2(rows)))
    _decode_kernel[(plan.splits, kv_heads, requests * triton.cdiv(rows, bm))](
        q,
        q_sketch,
        partial,
        partial_max,
        partial_sum,
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        ends=ends,
        table_stride=block_table.stride(0),
        offset=None if basis is None else basis.offset,
        offsets=None if basis is None else basis.offsets,
        bucket=1 if basis is None else basis.bucket,
        buckets=1 if basis is None else basis.buckets,
        scale=scale,
        soft_cap=soft_cap or 0.0,
        # Not compiled in: one binary serves every model of a head size and preset.
        kv_heads=kv_heads,
        q_per_kv=group,
        max_query_len=max_query_len,
        splits=plan.splits,
        WINDOW=window or 0,
        SOFT_CAP=bool(soft_cap),
        RECENT=ends is not None,
        BASIS=basis is not None,
        BUCKETS=basis is not None and basis.buckets > 1,
        DP=dp,
        BM=bm,
        BN=32 if dp <= 256 else 16,
        PRECISION=_precision(fmt, out.dtype),
        num_warps=4 if dp <= 128 else 8,
        num_stages=1,
        **page_arguments(cache, fmt),
        **level_arguments(cache, fmt),
    )
    combine(partial, partial_max, partial_sum, sinks, rotated, query_start_loc, seq_lens, plan, lse)
    transform_rows(rotated.view(query.shape), out, rotation_matrix(fmt, cache.device), transpose=False)
