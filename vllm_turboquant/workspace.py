"""GPU scratch that all layers share: its size depends on limits of the configuration, never on context or layer count.

vLLM's workspace manager owns it; `reserve` runs while vLLM profiles memory, so it is counted before the KV cache is sized.
"""

from __future__ import annotations

from functools import cache

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import max_decode_query_len
from vllm.v1.worker.workspace import current_workspace_manager

from .impl import compressed_layers, shared_layers
from .kernels.combine import plan_decode
from .kernels.cuda.launch import scratch_floats
from .plan import drafts_with_a_model
from .recent import reserve_pools

CONTEXT_BYTES = 48 * 2**20  # decoded keys and values of one range of older context


def context_tokens(kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Tokens of older context that are decoded at once."""
    return CONTEXT_BYTES // (2 * kv_heads * head_size * dtype.itemsize)


def max_query_len(vllm_config: VllmConfig) -> int:
    """Query tokens of a request up to which it is decoded: verified drafts, and what a draft model is given after them."""
    return int(max_decode_query_len(vllm_config)) + drafts_with_a_model(vllm_config)


def decode_scratch(floats: int, rows: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ``[floats]`` and, for log-sum-exps, fp32 ``rows``, tokens and query heads."""
    scratch, lse = current_workspace_manager().get_simultaneous(((floats,), torch.float32), (rows, torch.float32))
    return scratch, lse


def prefill_scratch(
    tokens: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, shared: bool = False
) -> list[torch.Tensor]:
    """Decoded keys and values ``[context_tokens, Hk, d]`` and a partial output ``[tokens, Hq, d]``.

    shared: for a layer that shares another's cache also keys and values of its new tokens, ``[tokens, Hk, d]``.
    """
    context = (context_tokens(kv_heads, head_size, dtype), kv_heads, head_size)
    shapes = [context, context, (tokens, heads, head_size), *([(tokens, kv_heads, head_size)] * 2 if shared else [])]
    return list(current_workspace_manager().get_simultaneous(*((shape, dtype) for shape in shapes)))


def reserve(vllm_config: VllmConfig, device: torch.device) -> None:
    """Grows the workspace to the most that any step of any compressed layer can ask for."""
    reserve_pools(vllm_config, device)
    scheduler = vllm_config.scheduler_config
    query_len = max_query_len(vllm_config)
    shared = bool(shared_layers(vllm_config))
    shapes = {(impl.num_heads, impl.num_kv_heads, impl.head_size) for impl in compressed_layers(vllm_config)}
    for heads, kv_heads, head_size in shapes:
        rows = scheduler.max_num_seqs * query_len, heads
        decode_scratch(_most_floats(scheduler.max_num_seqs, query_len, heads, kv_heads, head_size), rows)
        decode_scratch(scratch_floats(heads // kv_heads, head_size, query_len, device, rows[0] * heads), rows)
        prefill_scratch(scheduler.max_num_batched_tokens, heads, kv_heads, head_size, vllm_config.model_config.dtype, shared)


@cache
def _most_floats(max_requests: int, query_len: int, heads: int, kv_heads: int, head_size: int) -> int:
    """Scratch of the hungriest decode batch: more requests need fewer splits, so the largest batch need not be it."""
    plans = (plan_decode(n, n * query_len, heads, kv_heads, head_size, query_len) for n in range(1, max_requests + 1))
    return max(plan.floats for plan in plans)
