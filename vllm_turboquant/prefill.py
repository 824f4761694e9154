"""Prefill on a GPU: new tokens attend to their own raw keys and values, older context is decoded range by range.

A layer that shares another layer's cache is given none of its own and reads new tokens from the pages too.

Everything goes through FlashAttention; parts are merged by log-sum-exp. What is decoded when is planned once a step, per
request, and the same plan serves first chunks, continuations, prefix hits and mixed batches in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .plan import ContextPart, PrefillPlan

if TYPE_CHECKING:
    from .impl import TurboQuantImpl


def attend_prefill(
    layer: TurboQuantImpl,
    plan: PrefillPlan,
    query: torch.Tensor,
    raw: tuple[torch.Tensor, torch.Tensor] | None,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Causal attention of the batch's prefills; query and out are the prefills' own rows ``[T, H, d]``.

    raw: their keys and values, or None where another layer has stored them. block_table: int32 ``[R, *]`` of the whole batch.
    Writes all of ``out``. The workspace holds `workspace.CONTEXT_BYTES` of decoded context, whatever the context's length.
    """
    from .workspace import prefill_scratch

    shape = plan.tokens, layer.num_heads, layer.num_kv_heads, layer.head_size, query.dtype
    context_key, context_value, partial, *stored = prefill_scratch(*shape, shared=raw is None)
    key, value = raw or stored
    step = _LayerPrefill(layer, plan, query, key, value, cache, block_table, out, context_key, context_value, partial)
    if raw is None:
        step.load_own()
    if layer.sliding_window is not None and any(plan.bounds):
        lse = step.windows(layer.sliding_window)
    else:
        lse = step.own_tokens()
        for part in plan.parts(step.context_key.shape[0]):
            lse = step.older_context(part, lse)
    if layer.sinks is not None:
        # A sink takes part in the softmax without a value: it only shrinks what the tokens would give.
        share = torch.sigmoid(lse - layer.sinks.to(lse.dtype)[:, None])
        out.mul_(share.T[:, :, None])


@dataclass
class _LayerPrefill:
    """The prefills of one layer. lse: fp32 ``[Hq, T]``, log-sum-exp of each row's scores so far."""

    layer: TurboQuantImpl
    plan: PrefillPlan
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    out: torch.Tensor
    context_key: torch.Tensor
    context_value: torch.Tensor
    partial: torch.Tensor

    def _flash(
        self,
        rows: slice,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        starts: tuple[torch.Tensor, torch.Tensor],
        longest: tuple[int, int],
        causal: bool,
        window: int | None = None,
    ) -> torch.Tensor:
        """FlashAttention of ``query[rows]`` into ``out``; starts and longest: of queries and keys. Returns the lse."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        _, lse = flash_attn_varlen_func(
            q=self.query[rows],
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=starts[0],
            cu_seqlens_k=starts[1],
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            softmax_scale=self.layer.scale,
            causal=causal,
            window_size=[-1, -1] if window is None else [window - 1, 0],
            softcap=self.layer.logits_soft_cap or 0.0,
            return_softmax_lse=True,
            fa_version=self.layer.flash_attention,
        )
        return lse

    def _load(
        self,
        requests: slice,
        first: torch.Tensor,
        start_loc: torch.Tensor,
        longest: int,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Into the scratch for older context, or into ``out``."""
        from .kernels import prefill as portable
        from .kernels.cuda import context

        kernel = context if self.cache.shape[2] in self.layer.cuda_context_pages else portable
        blocks = self.block_table[self.plan.first + requests.start : self.plan.first + requests.stop]
        out = out or (self.context_key, self.context_value)
        kernel.load_context(self.cache, blocks, first, start_loc, longest, *out, self.layer.format, self.layer.basis)

    def load_own(self) -> None:
        """Fills ``key`` and ``value`` with the new tokens as they are stored."""
        plan = self.plan
        everyone = slice(0, len(plan.query_lens))
        self._load(everyone, plan.contexts, plan.query_start_loc, plan.longest, (self.key, self.value))

    def own_tokens(self) -> torch.Tensor:
        plan = self.plan
        starts = (plan.query_start_loc, plan.query_start_loc)
        longest = (plan.longest, plan.longest)
        window = self.layer.sliding_window
        return self._flash(slice(None), self.key, self.value, self.out, starts, longest, causal=True, window=window)

    def older_context(self, part: ContextPart, lse: torch.Tensor) -> torch.Tensor:
        """Adds one part of the older context to ``out`` and the lse."""
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        if part.loose:  # FlashAttention multiplies what lies behind a range's end by 0, which old scratch's NaN survives
            loose = slice(part.room - part.loose, part.room)
            self.context_key[loose].zero_()
            self.context_value[loose].zero_()
        self._load(part.requests, part.first, part.key_start_loc, part.longest_key)
        rows = part.rows
        partial = self.partial[: rows.stop - rows.start]
        starts, longest = (part.query_start_loc, part.key_start_loc), (part.longest_query, part.longest_key)
        key, value = self.context_key[: part.room], self.context_value[: part.room]
        part_lse = self._flash(rows, key, value, partial, starts, longest, causal=False)
        merged = torch.empty_like(part_lse)
        merge_attn_states(
            output=self.out[rows],
            prefix_output=partial,
            prefix_lse=part_lse,
            suffix_output=self.out[rows],
            suffix_lse=lse[:, rows].contiguous(),
            output_lse=merged,
        )
        if merged.shape == lse.shape:
            return merged
        lse = lse.clone()
        lse[:, rows] = merged
        return lse

    def windows(self, window: int) -> torch.Tensor:
        """Sliding window over older context: the window's tail is decoded in front of the raw rows, then one causal call.

        Only context that a row can see is read: vLLM frees and reuses the rest. Rows go in blocks that fit the workspace.
        """
        lse = torch.empty(self.layer.num_heads, self.query.shape[0], dtype=torch.float32, device=self.query.device)
        for part in self.plan.windows(window, self.context_key.shape[0]):
            raw, tail, length = part.own, part.tail, part.longest_key
            self._load(slice(part.request, part.request + 1), part.first, part.tail_start_loc, tail)
            self.context_key[tail:length].copy_(self.key[raw])
            self.context_value[tail:length].copy_(self.value[raw])
            lse[:, part.rows] = self._flash(
                part.rows,
                self.context_key[:length],
                self.context_value[:length],
                self.out[part.rows],
                (part.query_start_loc, part.key_start_loc),
                (part.rows.stop - part.rows.start, length),
                causal=True,
                window=window,
            )
        return lse
