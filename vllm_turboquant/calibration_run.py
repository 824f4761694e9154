"""One run of a loaded model over random tokens, without KV cache, that collects statistics of keys and queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from .kernels.attention import attend_raw
from .kernels.statistics import KeyStatistics
from .rotary import is_rotary, turns


@dataclass(frozen=True)
class Recipe:
    """``tokens`` random ids in sequences of ``sequence``, and how many ``shifts`` of them cover the served length."""

    tokens: int
    sequence: int
    shifts: int
    seed: int

    def limited(self, config: VllmConfig) -> Recipe:
        """With sequences that the engine could be asked for in one step: buffers of a model may be that small."""
        most = min(config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens)
        return replace(self, sequence=min(self.sequence, most))


RECIPE = Recipe(tokens=2048, sequence=1024, shifts=16, seed=0)


class RawAttention:
    """Stands in for a layer's implementation during the run: causal attention over the sequence that the run feeds."""

    supports_quant_query_input = False

    def __init__(self, run: _Run, name: str, impl: Any) -> None:
        self.run = run
        self.name = name
        self.impl = impl

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: object,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes attention of query ``[T, Hq, d]`` over key and value ``[T, Hk, d]`` into ``output``."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not offered while calibrating")
        key, value = self.run.see(self.name, layer.kv_sharing_target_layer_name, query, key, value)
        soft_cap, sinks = getattr(self.impl, "logits_soft_cap", None) or None, getattr(self.impl, "sinks", None)
        window = layer.sliding_window
        if soft_cap is None and sinks is None and (window is None or window >= len(query)):
            # What most layers are, at a quarter of the time.
            q, k, v = (x.float().transpose(0, 1)[None] for x in (query, key, value))
            attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.impl.scale, enable_gqa=True)
            attended = attended[0].transpose(0, 1)
        else:
            options = {"window": window, "soft_cap": soft_cap, "sinks": sinks}
            attended = attend_raw(query, key, value, self.impl.scale, **options, dtype=torch.float32)
        return output.copy_(attended.reshape(output.shape))


class _Run:
    """What the stand-ins share. ``rotary``: by layer, the module that turned its keys, None without."""

    def __init__(self, wanted: Set[str], targets: Set[str]) -> None:
        self.wanted = wanted
        self.statistics: dict[str, KeyStatistics] = {}
        self.rotary: dict[str, torch.nn.Module | None] = {}
        self._targets = targets
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotated_by: torch.nn.Module | None = None

    def rotated(self, module: torch.nn.Module, arguments: object, result: object) -> None:
        """A hook of all rotary modules. They are shared between layers, and some layers have one and do not use it."""
        self._rotated_by = module

    def see(
        self, name: str, target: str | None, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds what a layer attends with to the statistics of the layer whose keys it reads; returns those keys and values."""
        rotary, self._rotated_by = self._rotated_by, None
        if target is not None:
            key, value = self._kept[target]
        if key is None or value is None:
            raise ValueError(f"layer {name} brings no keys or values")
        if name in self._targets:
            self._kept[name] = (key, value)
        owner = target or name
        if owner in self.wanted:
            if owner not in self.statistics:
                self.statistics[owner] = KeyStatistics(key.shape[1], key.shape[2], key.device)
            self.statistics[owner].add(query, key)
        if target is None:
            self.rotary[name] = rotary
        return key, value


def run_model(
    config: VllmConfig, model: torch.nn.Module, attention: Mapping[str, Any], wanted: Set[str], device: torch.device
) -> dict[str, KeyStatistics]:
    """Statistics of the layers ``wanted``, spread over the served length, on the CPU.

    attention: all attention layers of the model by name, those that vLLM keeps uncompressed included. Raises whatever a model
    raises that cannot be run so.
    """
    recipe = RECIPE.limited(config)
    targets = {layer.kv_sharing_target_layer_name for layer in attention.values()} - {None}
    run = _Run(wanted, targets)
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.inference_mode(), set_current_vllm_config(config), _standing_in(run, model, attention):
        for start in range(0, recipe.tokens, recipe.sequence):
            count = min(recipe.sequence, recipe.tokens - start)
            ids = torch.randint(config.model_config.get_vocab_size(), (count,), generator=generator).to(device)
            positions = torch.arange(count, device=device)
            # Eager: what is compiled was not compiled yet, and compiling for this one length would cost more than the run.
            with set_forward_context(None, config, num_tokens=count, skip_compiled=True):
                model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
        shifts = torch.linspace(0, config.model_config.max_model_len - recipe.sequence, recipe.shifts).long().unique().to(device)
        matrices: dict[int, torch.Tensor] = {}
        spread: dict[str, KeyStatistics] = {}
        for name, one in run.statistics.items():
            module = run.rotary[name]
            if module is not None:
                if id(module) not in matrices:
                    matrices[id(module)] = turns(module, shifts)
                one = one.spread(matrices[id(module)])
            spread[name] = one.to("cpu")
    return spread


@contextmanager
def _standing_in(run: _Run, model: torch.nn.Module, attention: Mapping[str, Any]) -> Iterator[None]:
    hooks = [module.register_forward_hook(run.rotated) for module in model.modules() if is_rotary(module)]
    impls = {name: layer.impl for name, layer in attention.items()}
    for name, layer in attention.items():
        layer.impl = RawAttention(run, name, impls[name])
    try:
        yield
    finally:
        for name, layer in attention.items():
            layer.impl = impls[name]
        for hook in hooks:
            hook.remove()
