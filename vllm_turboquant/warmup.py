"""Compiles every kernel that serving can need before the server is ready, on a block of scratch pages."""

from __future__ import annotations

from collections.abc import Collection

import torch
from vllm.config import VllmConfig

from .decode import attend_decode
from .impl import TurboQuantImpl, compressed_layers
from .kernels.cuda import context, launch
from .kernels.cuda import store as cuda_store
from .kernels.format import UNIT_TOKENS
from .kernels.prefill import load_context
from .kernels.recent_claim import RecentUnits
from .kernels.recent_keep import keep
from .kernels.store import FEW_TOKENS
from .plan import PrefillPlan
from .prefill import attend_prefill
from .workspace import prefill_scratch


def warm_up(
    vllm_config: VllmConfig, layer_names: Collection[str], block_size: int, max_query_len: int, device: torch.device
) -> None:
    """Chooses each layer's kernels and runs every kernel once for each kind of layer. Touches no page of the KV cache."""
    dtype = vllm_config.model_config.dtype
    seen: set[tuple[object, ...]] = set()
    for impl in compressed_layers(vllm_config, layer_names):
        if launch.prepare(
            device,
            impl.format,
            block_size,
            dtype,
            impl.num_heads // impl.num_kv_heads,
            max_query_len,
            window=impl.sliding_window,
            soft_cap=impl.logits_soft_cap,
            sinks=None if impl.sinks is None else impl.sinks.dtype,
            basis=impl.basis,
            recent=impl.recent is not None,
        ):
            impl.cuda_decode_pages.add(block_size)
        if context.prepare(device, impl.format, block_size, dtype, impl.basis):
            impl.cuda_context_pages.add(block_size)
        if cuda_store.prepare(device, impl.format, block_size, dtype, impl.basis):
            impl.cuda_store_pages.add(block_size)
        kind = (
            impl.preset,
            impl.num_heads,
            impl.num_kv_heads,
            impl.head_size,
            impl.sliding_window,
            impl.logits_soft_cap,
            impl.sinks is not None,
            0 if impl.basis is None else impl.basis.buckets,
            impl.recent is not None,
        )
        if kind not in seen:
            seen.add(kind)
            _run_once(impl, dtype, block_size, max_query_len, device)


def _run_once(impl: TurboQuantImpl, dtype: torch.dtype, block_size: int, max_query_len: int, device: torch.device) -> None:
    fmt, heads, kv_heads, d = impl.format, impl.num_heads, impl.num_kv_heads, impl.head_size
    cache = torch.zeros(1, kv_heads, block_size, fmt.slot_bytes, dtype=torch.uint8, device=device)
    # Rows of the fused projection that vLLM hands over, so that strides specialise alike.
    qkv = torch.zeros(FEW_TOKENS + 1, (heads + 2 * kv_heads) * d, dtype=dtype, device=device)
    query, key, value = (x.unflatten(1, (-1, d)) for x in qkv.split([heads * d, kv_heads * d, kv_heads * d], dim=1))
    nowhere = torch.full((len(qkv),), -1, dtype=torch.int64, device=device)
    for tokens in (1, len(qkv)):
        store = impl.store_kernel(block_size, tokens)
        store(key, value, cache, nowhere[:tokens], fmt, impl.basis, torch.zeros_like(nowhere))
    query, key, value, slots = query[:1], key[:1], value[:1], torch.zeros_like(nowhere[:1])
    table = torch.zeros(1, 16, dtype=torch.int32, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    if block_size not in impl.cuda_context_pages:
        context_key, context_value, _ = prefill_scratch(1, heads, kv_heads, d, dtype)
        load_context(cache, table, torch.zeros_like(one), starts, 1, context_key, context_value, fmt, impl.basis)
    if impl.flash_attention == 4:  # which is compiled when it is first called
        raw = None if impl.kv_sharing_target_layer_name is not None else (key, value)
        for older in (0, 1):
            plan = PrefillPlan(0, 0, [1], [older], starts, one * older)
            attend_prefill(impl, plan, query, raw, cache, table, torch.empty_like(query))
    recent = None
    if impl.recent is not None:
        # The page's units have no frame and the request no exact token, but for kernels that is all the same.
        recent = RecentUnits(block_size // UNIT_TOKENS, 1, 1, impl.format.preset.recent, max_query_len, block_size, device)
        recent.ends.fill_(1)
        mean = None if impl.basis is None else impl.basis.mean
        keep(key, value, slots, impl.recent.key, impl.recent.value, recent.frame_of, mean)
    out = torch.empty(1, heads, d, dtype=dtype, device=device)
    attend_decode(impl, query, cache, table, one, starts, out, max_query_len, recent)
