"""Pages of one size where layers that are left out stand beside windows: what vLLM's planner would otherwise pad away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs


def unaligned(specs: dict[str, Any], vllm_config: VllmConfig) -> dict[str, Any]:
    """``specs`` without what vLLM does to windows beside skipped layers on GPUs.

    It takes one layer's backend for that of all, so that its page is none of ours where the first layer is skipped.
    """
    padded = {n: s for n, s in specs.items() if isinstance(s, AttentionSpec) and s.page_size_padded is not None}
    block_size = vllm_config.cache_config.block_size
    return specs | {name: replace(spec, block_size=block_size, page_size_padded=None) for name, spec in padded.items()}


def fit(specs: dict[str, Any], vllm_config: VllmConfig) -> dict[str, Any]:
    """``specs``, with blocks of compressed layers so long that their pages are nearly those of the other attention layers.

    Where groups of layers share one pool, vLLM gives all of them the page of the largest, and a compressed page that does not
    divide it is padded: the memory would hold no token more. Layers of full attention alone share nothing and stay as they are.
    """
    context: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    attention = {name: spec for name, spec in specs.items() if isinstance(spec, AttentionSpec)}
    ours = {n: s for n, s in attention.items() if hasattr(getattr(context.get(n), "attn_backend", None), "turboquant_preset")}
    others = [spec.page_size_bytes for name, spec in attention.items() if name not in ours]
    if not ours or not others or UniformTypeKVCacheSpecs.from_specs(specs) is not None:
        return specs
    largest = max(spec.page_size_bytes for spec in ours.values())
    times = _times(max(others) / largest)
    # Pages of other head sizes divide the largest.
    fitted = {n: replace(s, block_size=s.block_size * times * (largest // s.page_size_bytes)) for n, s in ours.items()}
    return {**specs, **fitted}


def _times(ratio: float) -> int:
    """The whole number of our pages in one of theirs that wastes the smallest share of either."""
    below = max(int(ratio), 1)
    return min((below, below + 1), key=lambda times: 1 - min(times / ratio, ratio / times))
