"""Split-KV decode: how a launch is split, and the merge of what its parts found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .tables import next_power_of_2

MAX_SPLITS = 64
NO_TOKEN = tl.constexpr(-1e30)  # the lse of none
_PROGRAMS = 528  # programs that keep a large GPU busy: four on each of 132 multiprocessors


@dataclass(frozen=True)
class DecodePlan:
    """Sizes of one decode launch; they depend on shapes alone. ``floats``: fp32 scratch elements."""

    requests: int
    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    max_query_len: int
    splits: int

    @property
    def rows(self) -> int:
        return self.requests * self.heads * self.max_query_len * self.splits

    @property
    def floats(self) -> int:
        return 3 * self.tokens * self.heads * self.head_size + self.rows * (self.head_size + 2)


def plan_decode(requests: int, tokens: int, heads: int, kv_heads: int, head_size: int, max_query_len: int) -> DecodePlan:
    """Splits that fill a large GPU at this batch size, at most `MAX_SPLITS`."""
    splits = min(MAX_SPLITS, max(1, next_power_of_2(_PROGRAMS // max(1, requests * kv_heads))))
    return DecodePlan(requests, tokens, heads, kv_heads, head_size, max_query_len, splits)


@triton.jit(do_not_specialize=["kv_heads", "q_per_kv", "max_query_len", "splits"])
def _combine_kernel(
    partial,
    partial_max,
    partial_sum,
    sinks,
    out,
    query_start_loc,
    seq_lens,
    lse,
    kv_heads,
    q_per_kv,
    max_query_len,
    splits,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    request, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    query, member = row // q_per_kv, row % q_per_kv
    if query < q_len:
        d = tl.arange(0, DP)
        part = ((request.to(tl.int64) * kv_heads + head) * (q_per_kv * max_query_len) + row) * splits
        peak = tl.full([1], -float("inf"), tl.float32)
        for s in range(splits):
            peak = tl.maximum(peak, tl.load(partial_max + part + s))
        if SINKS:
            sink = tl.load(sinks + head * q_per_kv + member).to(tl.float32)
            peak = tl.maximum(peak, sink)
        base = tl.where(peak == -float("inf"), 0.0, peak)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([DP], tl.float32)
        for s in range(splits):
            top = tl.load(partial_max + part + s)
            if top > -float("inf") or top != top:  # a split without tokens holds nothing
                weight = tl.exp(top - base)
                total += weight * tl.load(partial_sum + part + s)
                acc += weight * tl.load(partial + (part + s) * D + d, mask=d < D, other=0.0)
        if SINKS:
            total += tl.exp(sink - base)
        # A request of length 0 (a padded row) has no weight at all: 0, not 0 / 0.
        dead = tl.load(seq_lens + request) <= 0
        if LSE:
            dead |= tl.sum(total, axis=0) == 0
        result = tl.where(dead, 0.0, acc / tl.where(dead, 1.0, total))
        target = ((q_start + query).to(tl.int64) * kv_heads + head) * q_per_kv + member
        tl.store(out + target * D + d, result, mask=d < D)
        if LSE:
            found = tl.where(dead, NO_TOKEN, base + tl.log(tl.where(dead, 1.0, total)))
            tl.store(lse + target, tl.sum(found, axis=0))


def combine(
    partial: torch.Tensor,
    partial_max: torch.Tensor,
    partial_sum: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: DecodePlan,
    lse: torch.Tensor | None = None,
) -> None:
    """Merges the splits of each row into ``out``, fp32 ``[T, Hq, d]`` contiguous; rows of no request stay as they are.

    partial: fp32 ``[R, Hk, rows, splits, d]``, not normalised; partial_max, partial_sum: fp32 ``[R, Hk, rows, splits]``, the
    softmax's maximum (-inf: no token) and sum. sinks: ``[Hq]`` logits without a value. lse: fp32 ``[T, Hq]`` contiguous, written;
    with it rows may be without a token: those are 0, and their lse is -1e30.
    """
    group = plan.heads // plan.kv_heads
    _combine_kernel[(plan.requests, group * plan.max_query_len, plan.kv_heads)](
        partial,
        partial_max,
        partial_sum,
        sinks,
        out,
        query_start_loc,
        seq_lens,
        lse,
        plan.kv_heads,
        group,
        plan.max_query_len,
        plan.splits,
        SINKS=sinks is not None,
        LSE=lse is not None,
        D=plan.head_size,
        DP=next_power_of_2(plan.head_size),
        num_warps=1,
    )
