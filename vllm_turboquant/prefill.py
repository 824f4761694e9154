"""Prefill on a GPU: new tokens attend to their own raw keys and values, older context is decoded range by range.

Everything goes through FlashAttention; parts are merged by log-sum-exp. What is decoded when is planned once a step, per
request, and the same plan serves first chunks, continuations, prefix hits and mixed batches in every layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from .impl import TurboQuantImpl


@dataclass
class PrefillPlan:
    """The prefills of a batch: requests ``first ..`` of it, tokens from ``start`` on.

    query_lens, contexts: host ints per prefill (new tokens, older tokens). query_start_loc: int32 ``[n + 1]`` on the
    device, from 0.
    """

    first: int
    start: int
    query_lens: list[int]
    contexts: list[int]
    query_start_loc: torch.Tensor

    @property
    def tokens(self) -> int:
        return sum(self.query_lens)


@dataclass
class ContextPart:
    """Ranges of older context that fit the workspace together: ``(request, first token, count)``, ascending requests."""

    ranges: list[tuple[int, int, int]]
    used: int = 0


def plan_prefill(common: CommonAttentionMetadata, decodes: int, device: torch.device) -> PrefillPlan:
    """Reads the host copies of lengths that vLLM keeps; no synchronisation."""
    starts: list[int] = common.query_start_loc_cpu[decodes : common.num_reqs + 1].tolist()
    lengths: list[int] = common.seq_lens_cpu_upper_bound[decodes : common.num_reqs].tolist()
    query_lens = [b - a for a, b in itertools.pairwise(starts)]
    contexts = [length - rows for length, rows in zip(lengths, query_lens, strict=True)]
    location = common.query_start_loc[decodes : common.num_reqs + 1] - starts[0]
    return PrefillPlan(decodes, starts[0], query_lens, contexts, location)


def split_contexts(contexts: list[int], capacity: int) -> list[ContextPart]:
    """Packs all context tokens into parts of at most ``capacity`` tokens, each request at most once a part."""
    parts: list[ContextPart] = []
    part = ContextPart([])
    for request, context in enumerate(contexts):
        done = 0
        while done < context:
            count = min(context - done, capacity - part.used)
            if count == 0 or (part.ranges and part.ranges[-1][0] == request):
                parts.append(part)
                part = ContextPart([])
                continue
            part.ranges.append((request, done, count))
            part.used += count
            done += count
    return [*parts, part] if part.ranges else parts


def _device_ints(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)


def _offsets(lengths: list[int]) -> list[int]:
    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    return total


def attend_prefill(
    layer: TurboQuantImpl,
    plan: PrefillPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Causal attention of the batch's prefills; query, key, value, out are the prefills' own rows ``[T, H, d]``.

    Writes all of ``out``. The workspace holds `workspace.CONTEXT_BYTES` of decoded context, whatever the context's length.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    from .kernels.prefill import load_context
    from .workspace import prefill_scratch

    context_key, context_value, partial = prefill_scratch(
        plan.tokens, layer.num_heads, layer.num_kv_heads, layer.head_size, query.dtype
    )
    common: dict[str, object] = {
        "softmax_scale": layer.scale,
        "softcap": layer.logits_soft_cap or 0.0,
        "fa_version": layer.flash_attention,
        "return_softmax_lse": True,
    }
    if layer.sliding_window is not None and any(plan.contexts):
        lse = _attend_windows(layer, plan, query, key, value, cache, block_table, out, context_key, context_value, common)
    else:
        longest = max(plan.query_lens)
        window = [-1, -1] if layer.sliding_window is None else [layer.sliding_window - 1, 0]
        _, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=plan.query_start_loc,
            cu_seqlens_k=plan.query_start_loc,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            window_size=window,
            **common,
        )
        starts = _offsets(plan.query_lens)
        for part in split_contexts(plan.contexts, context_key.shape[0]):
            used = 0
            for request, first, count in part.ranges:
                blocks = block_table[plan.first + request]
                load_context(cache, blocks, first, count, context_key[used:], context_value[used:], layer.format)
                used += count
            begin, end = part.ranges[0][0], part.ranges[-1][0] + 1
            counts = [0] * (end - begin)
            for request, _, count in part.ranges:
                counts[request - begin] = count
            rows = slice(starts[begin], starts[end])
            _, part_lse = flash_attn_varlen_func(
                q=query[rows],
                k=context_key[:used],
                v=context_value[:used],
                out=partial[: rows.stop - rows.start],
                cu_seqlens_q=_device_ints([s - starts[begin] for s in starts[begin : end + 1]], query.device),
                cu_seqlens_k=_device_ints(_offsets(counts), query.device),
                max_seqlen_q=max(plan.query_lens[begin:end]),
                max_seqlen_k=max(counts),
                causal=False,
                **common,
            )
            lse = _merge(out, lse, partial, part_lse, rows)
    if layer.sinks is not None:
        # A sink takes part in the softmax without a value: it only shrinks what the tokens would give.
        share = torch.sigmoid(lse - layer.sinks.to(lse.dtype)[:, None])
        out.mul_(share.T[:, :, None])


def _merge(out: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, part_lse: torch.Tensor, rows: slice) -> torch.Tensor:
    """Merges a part's output (``partial``, from its row 0) into ``out[rows]``; returns the new log-sum-exp ``[Hq, T]``."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    merged = torch.empty_like(part_lse)
    merge_attn_states(
        output=out[rows],
        prefix_output=partial[: rows.stop - rows.start],
        prefix_lse=part_lse,
        suffix_output=out[rows],
        suffix_lse=lse[:, rows].contiguous(),
        output_lse=merged,
    )
    if merged.shape == lse.shape:
        return merged
    lse = lse.clone()
    lse[:, rows] = merged
    return lse


def _attend_windows(
    layer: TurboQuantImpl,
    plan: PrefillPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    context_key: torch.Tensor,
    context_value: torch.Tensor,
    common: dict[str, object],
) -> torch.Tensor:
    """Sliding window over older context: the window's tail is decoded in front of the raw rows, then one causal call.

    Only context that a row can see is read: vLLM frees and reuses the rest. Rows go in blocks that fit the workspace.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    from .kernels.prefill import load_context

    window = layer.sliding_window
    assert window is not None
    step = context_key.shape[0] - window
    assert step > 0, f"sliding window {window} exceeds the prefill workspace of {context_key.shape[0]} tokens"
    lse = torch.empty(layer.num_heads, query.shape[0], dtype=torch.float32, device=query.device)
    start = 0
    for request, (rows, context) in enumerate(zip(plan.query_lens, plan.contexts, strict=True)):
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            oldest = max(0, context + begin - window + 1)
            tail = max(0, context - oldest)
            raw = slice(start + max(0, oldest - context), start + end)
            length = tail + raw.stop - raw.start
            load_context(cache, block_table[plan.first + request], oldest, tail, context_key, context_value, layer.format)
            context_key[tail:length].copy_(key[raw])
            context_value[tail:length].copy_(value[raw])
            part = slice(start + begin, start + end)
            _, part_lse = flash_attn_varlen_func(
                q=query[part],
                k=context_key[:length],
                v=context_value[:length],
                out=out[part],
                cu_seqlens_q=_device_ints([0, end - begin], query.device),
                cu_seqlens_k=_device_ints([0, length], query.device),
                max_seqlen_q=end - begin,
                max_seqlen_k=length,
                causal=True,
                window_size=[window - 1, 0],
                **common,
            )
            lse[:, part] = part_lse
        start += rows
    return lse
