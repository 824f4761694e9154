"""Layers whose keys the preset's bits cannot carry, told by weights alone: they stay in full precision, and a line says so.

Where a key bias cannot be subtracted (``key_bias``), codes spend their bits on it: the error of a code is a share of the whole
key, and turns logits into noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype, set_default_torch_dtype
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend

from .config import FLAG, refuse
from .impl import TurboQuantImpl
from .kernels.codebook import LEVELS, LEVELS_PER_SIGMA, distortion
from .key_bias import biased_layers
from .refusals import SKIP_LAYERS

# Nats. Qwen2.5-Coder-1.5B at 4 bits: 49, 2.9, 1.8 and 0.8 in four layers, below 0.4 in all others. Were its bias not
# subtracted, the next token's divergence would be 5.9; without codes in the first three layers it is 0.031, in all four 0.013.
LIMIT = 0.5
_E4M3_ERROR = 7.0e-4  # mean square of rounding N(0, 1), whatever its scale


def logit_noise(query: torch.Tensor, key: torch.Tensor, scale: float, bits: int) -> float:
    """How far codes of keys move a logit, in nats: the standard deviation, of the head where it is largest.

    query, key: biases ``[Hq, d]``, ``[Hk, d]``, which is all that is known of queries and keys: a lower bound. A code of ``bits``
    errs by D / (1 - D) |k|^2, D the codebook's distortion, with a scale that makes it unbiased (EDEN, arXiv 2604.18555); evenly
    over all dims of a rotated key, so q times that error has the variance D / (1 - D) |q|^2 |k|^2 / d.
    """
    least = 0.0 if bits == 8 else distortion([level / LEVELS_PER_SIGMA[bits] for level in LEVELS[bits]])
    error = least / (1 - least) or _E4M3_ERROR
    heads, d = key.shape
    sizes = query.float().norm(dim=-1).view(heads, -1).amax(1) * key.float().norm(dim=-1)
    return scale * float(sizes.max()) * math.sqrt(error / d)


def noisy_layers(model: torch.nn.Module, layers: Mapping[str, Any]) -> dict[str, float]:
    """Those of ``layers``, compressed ones by name, whose `logit_noise` is above `LIMIT` on any rank; and how large it is."""
    own: dict[str, float] = {}
    for name, _, query, key in biased_layers(model, layers):
        impl: TurboQuantImpl = layers[name].impl
        own[name] = logit_noise(query, key, impl.scale, impl.format.preset.key.bits)
    group = get_tp_group()
    ranks: list[dict[str, float]] = [{}] * group.world_size
    torch.distributed.all_gather_object(ranks, own, group=group.cpu_group)
    largest = {name: max(rank[name] for rank in ranks) for name in own}
    return {name: noise for name, noise in largest.items() if noise > LIMIT}


def keep_exact(noisy: Mapping[str, float], layers: Mapping[str, Any], config: VllmConfig) -> str:
    """Gives the layers in ``noisy`` vLLM's own backend and pages; returns the line that names layers, reason and cost.

    layers: all compressed ones; those that read a noisy one's cache follow it. Raises TurboQuantError where no layer would be
    left, and for layers that vLLM builds in a way of their own.
    """
    followers = {name for name, layer in layers.items() if layer.kv_sharing_target_layer_name in noisy}
    impl: TurboQuantImpl = next(iter(layers.values())).impl
    preset, bits = impl.preset, impl.format.preset.key.bits
    if layers.keys() <= noisy.keys() | followers:
        reason = f"key biases, which cannot be subtracted here, would make noise of the logits of every layer at {bits} bits"
        raise refuse(FLAG, preset, reason, f"calibrate the model, or use {FLAG} auto")
    more = 0
    for name in (*noisy, *followers):
        layer = layers[name]
        if type(layer) is not Attention:
            reason = f"its key bias, which cannot be subtracted, would make noise of the logits of layer {name} at {bits} bits"
            raise refuse(FLAG, preset, reason, f"leave the layer out with {SKIP_LAYERS}")
        if name in noisy:
            plain = 2 * layer.head_size * config.model_config.dtype.itemsize
            more += layer.num_kv_heads * (plain - layer.impl.format.slot_bytes)
        _serve_plain(layer, config)
        layer.turboquant_kept = f"as {bits} bits cannot carry their key bias"
    named = ", ".join(f"{name} ({noise:.1f} nats)" for name, noise in noisy.items())
    return (
        f"left out are layers whose key bias cannot be subtracted and would, in keys of {bits} bits, move logits by more than "
        f"{LIMIT} nats: {named}; {more:,} bytes more per token on this rank."
    )


def _serve_plain(layer: Attention, config: VllmConfig) -> None:
    """Makes of a compressed layer what vLLM builds for one that ``--kv-cache-dtype-skip-layers`` names."""
    ours: TurboQuantImpl = layer.impl
    dtype = config.model_config.dtype
    with set_current_vllm_config(config), set_default_torch_dtype(dtype):
        backend = get_attn_backend(
            ours.head_size,
            dtype,
            "auto",
            has_sink=ours.sinks is not None,
            use_mm_prefix=layer.use_mm_prefix,
            attn_type=layer.attn_type,
            has_sliding_window=ours.sliding_window is not None,
        )
        layer.impl = backend.get_impl_cls()(
            ours.num_heads,
            ours.head_size,
            ours.scale,
            ours.num_kv_heads,
            None,
            ours.sliding_window,
            "auto",
            ours.logits_soft_cap,
            layer.attn_type,
            ours.kv_sharing_target_layer_name,
            **({} if ours.sinks is None else {"sinks": ours.sinks}),
        )
    layer.attn_backend = backend
    layer.backend = AttentionBackendEnum[backend.get_name()]
    layer.kv_cache_dtype = "auto"
    layer.kv_cache_torch_dtype = kv_cache_dtype_str_to_dtype("auto", config.model_config)
    layer.impl.process_weights_after_loading(dtype)
