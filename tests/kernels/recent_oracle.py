"""Requests whose newest tokens lie in frames, and float64 attention over all of their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class RecentBatch:
    query: torch.Tensor  # [T, Hq, d]
    out: torch.Tensor  # [T, Hq, d]: attention to the tokens before the exact ones; NaN where undefined
    lse: torch.Tensor  # fp32 [T, Hq], NaN where undefined
    tensors: tuple[torch.Tensor, ...]  # pools, frame_of, block_table, seq_lens, query_start_loc, ends
    requests: list[tuple[int, int, int]]  # length, query tokens, first exact position
    before: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [ends, Hk, d], as they count
    recent: list[tuple[torch.Tensor, torch.Tensor]]
    block_size: int
    max_query_len: int
    sinks: torch.Tensor


def softmax(q, k, v, position, first, scale, window, soft_cap, sinks):
    """One query token ``[Hq, d]`` at ``position``, over keys from position ``first`` on: attention ``[Hq, d]``, lse ``[Hq]``."""
    group = q.shape[0] // k.shape[1]
    n = first + torch.arange(len(k), device=q.device)
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("hd,nhd->hn", q.double(), k) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    hidden = n > position
    if window:
        hidden |= n <= position - window
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None]], 1)
    lse = torch.logsumexp(scores, 1)
    weights = torch.exp(scores - lse.clamp(min=-1e300)[:, None])[:, : len(n)]
    return torch.einsum("hn,nhd->hd", weights, v), lse


def make_recent(
    requests, max_query_len, kv_heads, group, head_size, block_size, dtype, seed,
    window=None, soft_cap=None, sinks=False, scale=0.3, device="cpu",
):  # fmt: skip
    """Pools full of NaN but for the exact tokens, random tables, and what attention to the tokens before gives."""
    g = torch.Generator().manual_seed(seed)
    per_block = block_size // 16
    blocks = [-(-length // block_size) for length, _, _ in requests]
    order = torch.randperm(sum(blocks) + 2, generator=g).to(torch.int32)
    table = torch.full((len(requests), max(blocks) + 1), -1, dtype=torch.int32)
    units = (sum(blocks) + 2) * per_block
    frames = torch.randperm(units, generator=g).to(torch.int32)
    pools = [torch.full((units, 16, kv_heads, head_size), float("nan"), dtype=dtype) for _ in range(2)]
    frame_of = torch.full((units + 1,), -1, dtype=torch.int32)
    tokens = sum(new for _, new, _ in requests) + 1
    # A view with strides of its own.
    query = torch.randn(tokens, 2, kv_heads * group, head_size, generator=g).to(dtype)[:, 1]
    out = torch.full((tokens, kv_heads * group, head_size), float("nan"), dtype=dtype)
    lse = torch.full((tokens, kv_heads * group), float("nan"))
    sink_logits = torch.randn(kv_heads * group, generator=g)
    before, recent, starts, taken = [], [], [0], 0
    for r, (length, new, end) in enumerate(requests):
        table[r, : blocks[r]] = order[taken : taken + blocks[r]]
        taken += blocks[r]
        k, v = (torch.randn(length, kv_heads, head_size, generator=g).to(dtype) for _ in range(2))
        before.append((k[:end], v[:end]))
        recent.append((k[end:], v[end:]))
        for position in range(end, length):
            unit = int(table[r, position // block_size]) * per_block + position % block_size // 16
            frame_of[unit] = frames[unit]
            for pool, x in zip(pools, (k, v), strict=True):
                pool[int(frames[unit]), position % 16] = x[position]
        for row in range(starts[-1], starts[-1] + new) if end > 0 else ():
            position = length - (starts[-1] + new - row)
            own = sink_logits if sinks else None
            o, s = softmax(query[row], k[:end], v[:end], position, 0, scale, window, soft_cap, own)
            out[row], lse[row] = o.to(dtype), s.float()
        starts.append(starts[-1] + new)
    ints = {"dtype": torch.int32}
    lengths, ends = (torch.tensor([request[n] for request in requests], **ints) for n in (0, 2))
    tensors = (*pools, frame_of, table, lengths, torch.tensor(starts, **ints), ends)
    on = [x.to(device) for x in (query, out, lse, sink_logits)]
    parts = [[(k.to(device), v.to(device)) for k, v in side] for side in (before, recent)]
    return RecentBatch(*on[:3], tuple(x.to(device) for x in tensors), requests, *parts, block_size, max_query_len, on[3])


def merged(batch, scale=0.3, window=None, soft_cap=None, sinks=None):
    """Float64 attention over the tokens before and the exact ones; what `out` holds where there are none of these."""
    truth = batch.out.double()
    start = 0
    for (length, new, end), before, recent in zip(batch.requests, batch.before, batch.recent, strict=True):
        k, v = (torch.cat(pair) for pair in zip(before, recent, strict=True))
        for row in range(start, start + new) if end < length else ():
            position = length - (start + new - row)
            truth[row] = softmax(batch.query[row], k, v, position, length - len(k), scale, window, soft_cap, sinks)[0]
        start += new
    return truth
