"""Real attention layers of vLLM and its planner's answers, for a configuration and a list of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Layer:
    """One attention layer to build. ``window``: a sliding window, None is full attention."""

    head_size: int = 128
    kv_heads: int = 2
    window: int | None = None


def build(config: Any, layers: list[Layer]) -> dict[str, Any]:
    """vLLM's own ``Attention`` modules: backend selection and per-layer dtype are vLLM's (and the plugin's)."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    built: dict[str, Any] = {}
    with set_current_vllm_config(config):
        for index, layer in enumerate(layers):
            name = f"model.layers.{index}.self_attn.attn"
            built[name] = Attention(
                num_heads=layer.kv_heads * 2,
                head_size=layer.head_size,
                scale=layer.head_size**-0.5,
                num_kv_heads=layer.kv_heads,
                cache_config=config.cache_config,
                per_layer_sliding_window=layer.window,
                prefix=name,
            )
    return built


def specs(config: Any, built: dict[str, Any]) -> dict[str, Any]:
    """What the model runner asks of each layer, packed by its backend."""
    from vllm.v1.worker.utils import customize_attention_spec

    return {
        name: customize_attention_spec(layer.get_attn_backend(), layer.get_kv_cache_spec(config)) for name, layer in built.items()
    }


def plan(config: Any, wanted: dict[str, Any], memory: int, layout: str = "LBHNC") -> Any:
    """vLLM's KVCacheConfig for one worker with ``memory`` bytes."""
    config.cache_config.kv_cache_layout = layout
    try:
        from vllm.v1.core import kv_cache_planning as planning  # 0.33
    except ImportError:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        (planned,) = get_kv_cache_configs(config, [wanted], [memory])
        return planned
    groups = planning.get_global_kv_cache_groups(config, [wanted])
    (planned,) = planning.get_kv_cache_configs(config, [wanted], [memory], groups)
    return planned


def planned_specs(planned: Any) -> dict[str, Any]:
    """Layer name to its spec after planning: block sizes may have grown, pages may have been padded."""
    found: dict[str, Any] = {}
    for group in planned.kv_cache_groups:
        inner = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            found[name] = inner[name] if inner else group.kv_cache_spec
    return found


def views(planned: Any, raw: torch.Tensor, layout: str) -> dict[str, torch.Tensor]:
    """Layer name to its ``[B, H, N, C]`` view of ``raw``, by vLLM's own function."""
    from vllm.v1.kv_cache_interface import KVCacheLayout, create_kv_cache_views

    by_layer = planned_specs(planned)
    result: dict[str, torch.Tensor] = {}
    for tensor in planned.kv_cache_tensors:
        spec = by_layer[tensor.layers[0]]
        made = create_kv_cache_views(raw, spec, planned.num_blocks, KVCacheLayout[layout], tensor)
        result.update(zip(tensor.layers, made, strict=True))
    return result
