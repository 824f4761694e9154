"""GPU scratch that all layers share: its size depends on limits of the configuration, never on context or layer count.

vLLM's workspace manager owns it; `reserve` runs while vLLM profiles memory, so it is counted before the KV cache is sized.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import max_decode_query_len
from vllm.v1.worker.workspace import current_workspace_manager

from .impl import compressed_layers
from .kernels.combine import plan_decode

CONTEXT_BYTES = 48 * 2**20  # decoded keys and values of one range of older context


def context_tokens(kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Tokens of older context that are decoded at once."""
    return CONTEXT_BYTES // (2 * kv_heads * head_size * dtype.itemsize)


def decode_scratch(floats: int) -> torch.Tensor:
    """fp32 ``[floats]``."""
    return current_workspace_manager().get_simultaneous(((floats,), torch.float32))[0]


def prefill_scratch(
    tokens: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decoded keys and values ``[context_tokens, Hk, d]`` and a partial output ``[tokens, Hq, d]``."""
    context = (context_tokens(kv_heads, head_size, dtype), kv_heads, head_size)
    partial = (tokens, heads, head_size)
    key, value, out = current_workspace_manager().get_simultaneous((context, dtype), (context, dtype), (partial, dtype))
    return key, value, out


def reserve(vllm_config: VllmConfig) -> None:
    """Grows the workspace to the most that any step of any compressed layer can ask for."""
    scheduler = vllm_config.scheduler_config
    query_len = max_decode_query_len(vllm_config)
    shapes = {(impl.num_heads, impl.num_kv_heads, impl.head_size) for impl in compressed_layers(vllm_config)}
    for heads, kv_heads, head_size in shapes:
        floats = max(
            plan_decode(requests, requests * query_len, heads, kv_heads, head_size, query_len).floats
            for requests in range(1, scheduler.max_num_seqs + 1)
        )
        decode_scratch(floats)
        prefill_scratch(scheduler.max_num_batched_tokens, heads, kv_heads, head_size, vllm_config.model_config.dtype)
