"""The recent window: presets too coarse for the newest tokens of running requests keep those exactly, beside the pages.

The arithmetic is in ``kernels.recent_*``; here it is decided whether, for how many requests, and in what memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from .impl import TurboQuantImpl, compressed_layers
from .kernels.format import UNIT_TOKENS
from .kernels.recent_claim import RecentUnits, frame_bytes, frames_needed

logger = init_logger("vllm.turboquant")
# That have exact tokens at a time: bounds the pools where vLLM would run a thousand. Others are read from codes.
MAX_REQUESTS = 256
# Speculation without layers of its own, whose cache and steps would be others than the model's.
_WITHOUT_LAYERS = ("ngram", "[ngram]", "ngram_gpu", "suffix")


@dataclass(frozen=True)
class RecentPools:
    """One layer's exact keys (less the first mean of its basis) and values, ``[F, 16, Hk, d]`` in the model's dtype."""

    key: torch.Tensor
    value: torch.Tensor


def obstacle(vllm_config: VllmConfig) -> str | None:
    """Why the newest tokens cannot be kept; None where they can. Without, all tokens are read from codes, as stored."""
    speculation = vllm_config.speculative_config
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector fills blocks that no step of this server stores"
    if speculation is not None and speculation.method not in _WITHOUT_LAYERS:
        return f"speculation by {speculation.method} stores tokens in steps of its own"
    if vllm_config.model_config.is_hybrid:
        return "prefix-cache hits of models with state layers copy blocks outside of any step"
    if vllm_config.parallel_config.use_ubatching:
        return "batches are cut into micro-batches"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        return "layers that share a cache see other batches than those that fill it"
    return None


def decode_query_len(vllm_config: VllmConfig) -> int:
    """Query tokens of a request up to which it is a decode: one, and the drafts that are verified with it."""
    speculation = vllm_config.speculative_config
    return 1 if speculation is None else 1 + (speculation.num_speculative_tokens or 0)


def _frames(vllm_config: VllmConfig, window: int) -> int:
    requests = min(vllm_config.scheduler_config.max_num_seqs, MAX_REQUESTS)
    return frames_needed(requests, window, decode_query_len(vllm_config))


def pool_bytes(vllm_config: VllmConfig) -> int:
    """What `reserve_pools` takes for the compressed layers that exist so far."""
    windowed = [impl for impl in compressed_layers(vllm_config) if impl.format.preset.recent]
    if not windowed or obstacle(vllm_config) is not None:
        return 0
    dtype: torch.dtype = vllm_config.model_config.dtype
    owners = [impl for impl in windowed if impl.kv_sharing_target_layer_name is None]
    frames = _frames(vllm_config, windowed[0].format.preset.recent)
    return sum(frames * frame_bytes(impl.num_kv_heads, impl.head_size, dtype) for impl in owners)


def reserve_pools(vllm_config: VllmConfig, device: torch.device) -> None:
    """Gives every compressed layer of a preset with recent window its pools, once, and says so in one line.

    On a GPU also to be called while vLLM profiles memory: pools stay for good and are counted before the KV cache is sized.
    """
    windowed = [impl for impl in compressed_layers(vllm_config) if impl.format.preset.recent]
    if not windowed:
        return
    window, reason = windowed[0].format.preset.recent, obstacle(vllm_config)
    if reason is not None:
        logger.info_once("TurboQuant: the newest %d tokens are read from codes like all others: %s.", window, reason)
        return
    context: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    frames, dtype = _frames(vllm_config, window), vllm_config.model_config.dtype
    for impl in windowed:
        if impl.kv_sharing_target_layer_name is not None:
            continue
        if impl.recent is None:
            shape = (frames, UNIT_TOKENS, impl.num_kv_heads, impl.head_size)
            impl.recent = RecentPools(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
    for impl in windowed:
        if impl.kv_sharing_target_layer_name is not None:
            owner = getattr(context[impl.kv_sharing_target_layer_name], "impl", None)
            impl.recent = owner.recent if isinstance(owner, TurboQuantImpl) else None
    requests = min(vllm_config.scheduler_config.max_num_seqs, MAX_REQUESTS)
    line = "TurboQuant: the newest %d tokens of up to %d running requests are kept exactly as well, in %.2f GiB."
    logger.info_once(line, window, requests, pool_bytes(vllm_config) / 2**30)


class RecentWindow:
    """What a metadata builder keeps for its layers, which share a block table: `RecentUnits`, once there are pages."""

    def __init__(self, vllm_config: VllmConfig, layer_name: str, window: int, device: torch.device) -> None:
        self.vllm_config, self.layer_name, self.window, self.device = vllm_config, layer_name, window, device
        self.units: RecentUnits | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig, layer_names: list[str], device: torch.device) -> RecentWindow | None:
        """None where no layer has pools."""
        context: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            impl = getattr(context.get(name), "impl", None)
            if isinstance(impl, TurboQuantImpl) and impl.recent is not None:
                return cls(vllm_config, name, impl.format.preset.recent, device)
        return None

    def claim(
        self, block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, slot_mapping: torch.Tensor
    ) -> RecentUnits | None:
        """`RecentUnits.claim` of the step that these tensors describe; None while there are no pages."""
        pages: torch.Tensor = self.vllm_config.compilation_config.static_forward_context[self.layer_name].kv_cache
        if pages.ndim != 4:
            return None
        units, block_size = pages.shape[0] * pages.shape[2] // UNIT_TOKENS, pages.shape[2]
        if self.units is None or (self.units.units, self.units.block_size) != (units, block_size):
            # Graphs pad batches up to their own sizes.
            most = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
            most = max(most, self.vllm_config.scheduler_config.max_num_seqs)
            frames, new = _frames(self.vllm_config, self.window), decode_query_len(self.vllm_config)
            self.units = RecentUnits(units, frames, most, self.window, new, block_size, self.device)
        self.units.claim(block_table, seq_lens, query_start_loc, slot_mapping)
        return self.units
