"""The line after start-up: what is compressed and what is not, bytes and tokens against ``auto``, calibration.

The first rank of each pipeline stage logs it. By ``status`` it becomes a label of ``vllm:cache_config_info`` too, from which
``vllm-turboquant doctor --url`` repeats it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode, MambaSpec

from . import status
from .config import is_ours
from .kernels.format import UNIT_TOKENS
from .refusals import SKIP_LAYERS

logger = init_logger("vllm.turboquant")


def report(vllm_config: VllmConfig, kv_cache_config: Any, specs: dict[str, Any], calibration: str) -> None:
    """Logs the line. kv_cache_config: vLLM's KVCacheConfig of this worker. specs: what each of its layers asked for."""
    if get_tp_group().rank_in_group != 0 or not is_ours(vllm_config.cache_config.cache_dtype):
        return
    line = describe(vllm_config, kv_cache_config, specs, calibration)
    logger.info("TurboQuant: %s", line)
    parallel = vllm_config.parallel_config
    status.write(f"{parallel.data_parallel_index}-{get_pp_group().rank_in_group}", line)


def describe(vllm_config: VllmConfig, kv_cache_config: Any, specs: dict[str, Any], calibration: str) -> str:
    """The line, without its prefix."""
    compressed, kept = layers_of(vllm_config)
    parts = [vllm_config.cache_config.cache_dtype]
    if get_pp_group().world_size > 1:
        parts[0] += f", pipeline stage {get_pp_group().rank_in_group + 1} of {get_pp_group().world_size}"
    parts.append(f"{len(compressed)} attention layers compressed" + (f" ({_sizes(compressed, specs)})" if compressed else ""))
    parts += [f"{len(names)} not, {reason} ({', '.join(names)})" for reason, names in kept.items()] or ["none left out"]
    parts.append(_bytes(vllm_config, planned(kv_cache_config), specs))
    ours, _ = get_kv_cache_capacity(vllm_config, kv_cache_config)
    theirs = auto_tokens(vllm_config, specs, kv_cache_config.kv_cache_tensors[0].size)
    parts.append(f"{ours:,} tokens, {ours / theirs:.2f}x of auto's {theirs:,}" if theirs else f"{ours:,} tokens, auto has none")
    parts.append(calibration)
    hits = kv_cache_config.cache_hit_alignment_tokens
    if vllm_config.cache_config.enable_prefix_caching and hits:
        finer = "" if hits <= UNIT_TOKENS else f" (--prefix-match-unit {UNIT_TOKENS} makes them as short)"
        parts.append(f"cached prefixes are reused in steps of {hits} tokens, shorter ones not at all{finer}")
    return "; ".join(parts)


def layers_of(vllm_config: VllmConfig) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the compressed layers, and of the others by why they are not."""
    compressed: list[str] = []
    kept: dict[str, list[str]] = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        backend = getattr(layer, "attn_backend", None)
        if backend is None:
            continue
        if hasattr(backend, "turboquant_preset"):
            compressed.append(name)
        else:
            kept.setdefault(_reason(layer, vllm_config), []).append(name)
    return compressed, kept


def _reason(layer: Any, vllm_config: VllmConfig) -> str:
    attn_type = getattr(layer, "attn_type", AttentionType.DECODER)
    if attn_type != AttentionType.DECODER:
        return f"attention of type {attn_type}"
    if hasattr(layer, "turboquant_kept"):
        return str(layer.turboquant_kept)
    dtype = getattr(layer, "kv_cache_dtype", "auto")
    if dtype == "auto" and vllm_config.cache_config.kv_cache_dtype_skip_layers:
        return f"by {SKIP_LAYERS}"
    return f"of dtype {dtype}"


def _sizes(compressed: list[str], specs: dict[str, Any]) -> str:
    """Bytes of a token and KV head; layers that share another's cache have none of their own."""
    own = {(spec.head_size, spec.state_content_size_bytes) for name, spec in specs.items() if name in compressed}
    text = ", ".join(f"{size} bytes per token and KV head of {dims} dims" for dims, size in sorted(own))
    shared = sum(name not in specs for name in compressed)
    return text + (f"; {shared} of them read another layer's" if shared else "")


def planned(kv_cache_config: Any) -> dict[str, Any]:
    """Layer name to its spec after planning: blocks may have grown, pages may have been padded."""
    found: dict[str, Any] = {}
    for group in kv_cache_config.kv_cache_groups:
        inner = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        found |= {name: inner[name] if inner else group.kv_cache_spec for name in group.layer_names}
    return found


def _bytes(vllm_config: VllmConfig, pages: dict[str, Any], specs: dict[str, Any]) -> str:
    """Of a token in the pages of all attention layers that store it."""
    attention = {name: spec for name, spec in specs.items() if isinstance(spec, AttentionSpec)}
    ours = sum(pages[name].page_size_bytes / pages[name].block_size for name in attention)
    native = [_native(spec, vllm_config) for spec in attention.values()]
    theirs = sum(spec.unpadded_page_size_bytes / spec.block_size for spec in native)
    return f"{ours:,.0f} instead of {theirs:,.0f} bytes per token ({theirs / ours:.2f}x)"


def _native(spec: Any, vllm_config: VllmConfig) -> Any:
    """What the layer would ask for with dtype ``auto``; layers that are not ours as they are."""
    if spec.state_content_bytes is None:
        return spec
    dtype = vllm_config.model_config.dtype
    return replace(spec, dtype=dtype, state_content_bytes=None, kv_quant_mode=KVQuantMode.NONE, page_size_padded=None)


def auto_tokens(vllm_config: VllmConfig, specs: dict[str, Any], memory: int) -> int:
    """What vLLM's planner makes of ``memory`` bytes with dtype ``auto``."""
    config, cache = copy.copy(vllm_config), copy.copy(vllm_config.cache_config)
    cache.num_gpu_blocks_override = None
    config.cache_config = cache
    attention = {name: _native(spec, vllm_config) for name, spec in specs.items() if isinstance(spec, AttentionSpec)}
    states = {name: spec for name, spec in specs.items() if isinstance(spec, MambaSpec)}
    if states and attention:
        # As vLLM aligns them: the block of attention grows until its page covers a state.
        token = max(spec.unpadded_page_size_bytes / spec.block_size for spec in attention.values())
        state = max(replace(spec, page_size_padded=None).page_size_bytes for spec in states.values())
        step = 128 if current_platform.is_cpu() else type(cache).DEFAULT_BLOCK_SIZE
        block = step * -(-state // int(step * token))
        attention = {name: replace(spec, block_size=block) for name, spec in attention.items()}
        size = {"block_size": block} if cache.mamba_cache_mode == "align" else {}
        states = {name: replace(spec, page_size_padded=int(block * token), **size) for name, spec in states.items()}
        cache.block_size = block
    try:
        from vllm.v1.core import kv_cache_planning as planning  # 0.33
    except ImportError:
        from vllm.v1.core import kv_cache_utils as planning  # type: ignore[no-redef]
    groups = planning.get_kv_cache_groups(config, {**attention, **states})
    return get_kv_cache_capacity(config, planning.get_kv_cache_config_from_groups(config, groups, memory))[0]
