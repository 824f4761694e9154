"""Attention to the tokens that frames hold exactly, merged into that of the compressed tokens before them.

The compressed decode leaves out what frames hold. Lengths are read on the device and grids depend on shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format import UNIT_TOKENS
from .recent_claim import check_pools
from .softmax import add_scores, cap_scores
from .tables import next_power_of_2

_ROWS = 64  # query rows a program holds at most


@triton.jit(do_not_specialize=["table_stride", "kv_heads", "q_per_kv", "max_query_len"])
def _attend_kernel(
    query,
    out,
    lse,
    recent_key,
    recent_value,
    frame_of,
    block_table,
    seq_lens,
    query_start_loc,
    ends,
    sinks,
    query_stride_token,
    query_stride_head,
    out_stride_token,
    out_stride_head,
    lse_stride_token,
    lse_stride_head,
    table_stride,
    scale,
    soft_cap,
    kv_heads,
    q_per_kv,
    max_query_len,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    rows = q_per_kv * max_query_len
    row_blocks = tl.cdiv(rows, BM)
    request, row_block = tl.program_id(1) // row_blocks, tl.program_id(1) % row_blocks
    length = tl.load(seq_lens + request)
    begin = tl.load(ends + request)
    q_start = tl.load(query_start_loc + request)
    q_len = tl.minimum(tl.load(query_start_loc + request + 1) - q_start, max_query_len)
    row = row_block * BM + tl.arange(0, BM)
    member = row % q_per_kv
    place = row // q_per_kv
    if (begin < length) & (row_block * BM < q_len * q_per_kv):
        asked = place < q_len
        position = length - q_len + place
        d = tl.arange(0, DP)
        token, q_head = (q_start + place).to(tl.int64), (head * q_per_kv + member).to(tl.int64)
        mask = asked[:, None] & (d < D)[None, :]
        q = query + (token * query_stride_token + q_head * query_stride_head)[:, None] + d[None, :]
        q = tl.load(q, mask=mask, other=0.0).to(tl.float32)

        # What came before: without tokens, or with nothing written, it has no weight.
        follows = tl.where(begin > 0, q_len, 0)  # query tokens that have tokens before the exact ones
        before = lse + token * lse_stride_token + q_head * lse_stride_head
        before = tl.load(before, mask=asked & (place < follows), other=-float("inf"))
        some = (before > -1e29) | (before != before)  # NaN stays NaN
        before = tl.where(some, before, -float("inf"))
        target = out + (token * out_stride_token + q_head * out_stride_head)[:, None] + d[None, :]
        acc = tl.load(target, mask=mask & some[:, None], other=0.0).to(tl.float32)
        peak = before
        total = tl.where(some, 1.0, 0.0)
        if SINKS:
            sink = tl.load(sinks + q_head, mask=asked & (place >= follows), other=-float("inf")).to(tl.float32)
            peak = tl.where(place >= follows, sink, peak)
            total = tl.where(sink > -float("inf"), 1.0, total)

        first = begin
        if WINDOW > 0:
            first = tl.maximum(begin, length - q_len - WINDOW + 1)
        for start in range(first, length, BN):
            n = start + tl.arange(0, BN)
            live = n < length
            block = tl.load(block_table + request.to(tl.int64) * table_stride + n // BLOCK_SIZE, mask=live, other=0)
            unit = block.to(tl.int64) * (BLOCK_SIZE // 16) + n % BLOCK_SIZE // 16
            frame = tl.load(frame_of + unit, mask=live, other=-1).to(tl.int64)
            live &= frame >= 0
            source = ((frame * 16 + n % 16) * kv_heads + head)[:, None] * D + d[None, :]
            inside = live[:, None] & (d < D)[None, :]
            k = tl.load(recent_key + source, mask=inside, other=0.0).to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if SOFT_CAP:
                scores = cap_scores(scores, soft_cap)
            visible = live[None, :] & (n[None, :] <= position[:, None]) & asked[:, None]
            if WINDOW > 0:
                visible &= n[None, :] > position[:, None] - WINDOW
            scores = tl.where(visible, scores, -float("inf"))
            weights, shrink, peak, total = add_scores(scores, peak, total)
            v = tl.load(recent_value + source, mask=inside, other=0.0).to(tl.float32)
            acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(target, result.to(out.dtype.element_ty), mask=mask)


# Scores of 16-bit numbers are exact in tf32, which has fp16's mantissa; weights of values are rounded to it.
_PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32x3"}


def attend_recent(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    recent_key: torch.Tensor,
    recent_value: torch.Tensor,
    frame_of: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
    block_size: int,
    max_query_len: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Merges attention to the exact tokens of each request, positions ``ends[r]`` and later, into that to the tokens before.

    query: floating ``[T, Hq, d]``, as the model has it. out: floating ``[T, Hq, d]``, updated in place. lse: fp32 ``[T, Hq]``,
    only read, natural logarithms of the softmax's sums. Both are of the tokens before ``ends[r]``, sinks included; -1e29 or less
    means none. Where ``ends[r]`` is 0 they may hold anything, and ``sinks``, ``[Hq]`` logits, take part here. Where
    ``ends[r] >= seq_lens[r]`` nothing is exact and rows stay as they are. recent_key, recent_value: ``[F, 16, Hk, d]``,
    contiguous. frame_of, ends: int32, of `RecentUnits`. block_table: int32 ``[R, *]``, seq_lens: int32 ``[R]``,
    query_start_loc: int32 ``[R + 1]``: as for `decode`. block_size: slots of a page.
    """
    heads, d = query.shape[1:]
    kv_heads, requests = recent_key.shape[2], seq_lens.shape[0]
    check_pools(recent_key, recent_value, kv_heads, d)
    assert heads % kv_heads == 0 and query.stride(2) == 1 and out.stride(2) == 1 and block_table.stride(1) == 1
    assert lse.dtype == torch.float32 and lse.shape == query.shape[:2] == out.shape[:2] and block_size % UNIT_TOKENS == 0
    if requests == 0:
        return
    dp, group = next_power_of_2(d), heads // kv_heads
    rows = group * max_query_len
    bm = min(_ROWS if dp <= 128 else 32 if dp <= 256 else 16, max(16, next_power_of_2(rows)))
    _attend_kernel[(kv_heads, requests * triton.cdiv(rows, bm))](
        query,
        out,
        lse,
        recent_key,
        recent_value,
        frame_of,
        block_table,
        seq_lens,
        query_start_loc,
        ends,
        sinks,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        lse.stride(1),
        block_table.stride(0),
        scale,
        soft_cap or 0.0,
        kv_heads,
        group,
        max_query_len,
        WINDOW=window or 0,
        SOFT_CAP=bool(soft_cap),
        SINKS=sinks is not None,
        D=d,
        DP=dp,
        BLOCK_SIZE=block_size,
        BM=bm,
        BN=32 if dp <= 256 else 16,
        PRECISION=_PRECISION.get(recent_key.dtype, "ieee"),
        num_warps=4 if dp <= 128 else 8,
        num_stages=1,
    )
