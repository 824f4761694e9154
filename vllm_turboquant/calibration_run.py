"""One run of a loaded model, without KV cache, that collects statistics of keys and queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.forward_context import set_forward_context
from vllm.tokenizers import cached_tokenizer_from_config

from .kernels.attention import attend_raw
from .kernels.statistics import KeyStatistics, bucket_shifts, bucket_tokens, shifts
from .rotary import is_rotary, turns
from .texts import CALIBRATION_CONTEXT, CALIBRATION_TOKENS, blocks


@dataclass(frozen=True)
class Recipe:
    """How many ``tokens`` in sequences of ``sequence``."""

    tokens: int
    sequence: int

    def limited(self, config: VllmConfig) -> Recipe:
        """With sequences that the engine could be asked for in one step: buffers of a model may be that small."""
        most = min(config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens)
        return replace(self, sequence=min(self.sequence, most))


RECIPE = Recipe(CALIBRATION_TOKENS, CALIBRATION_CONTEXT)


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


def token_ids(model_config: Any, recipe: Recipe) -> list[torch.Tensor]:
    """What the model is run on, int64 ``[T]`` each, the same on all ranks: text, or random ids where vLLM loads no tokenizer.

    On SmolLM2 random ids leave codes of 4 bits 28% more divergence than text does.
    """
    group, ids = get_world_group(), None
    if group.is_first_rank:
        tokenizer = cached_tokenizer_from_config(model_config)
        if tokenizer is None:
            generator = torch.Generator().manual_seed(0)
            ids = list(torch.randint(model_config.get_vocab_size(), (recipe.tokens,), generator=generator).split(recipe.sequence))
        else:
            ids = blocks(tokenizer, "calibration", recipe.tokens, recipe.sequence)
    result: list[torch.Tensor] = group.broadcast_object(ids, src=0)
    return result


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
    with torch.inference_mode(), set_current_vllm_config(config), _standing_in(run, model, attention):
        # One bar for all ranks, on terminals only.
        quiet = None if get_world_group().is_first_rank else True
        for ids in tqdm(token_ids(config.model_config, recipe), "calibrating keys", unit="text", disable=quiet):
            positions = torch.arange(len(ids), device=device)
            # Eager: what is compiled was not compiled yet, and compiling for this one length would cost more than the run.
            with set_forward_context(None, config, num_tokens=len(ids), skip_compiled=True):
                model(input_ids=ids.to(device), positions=positions, intermediate_tensors=None, inputs_embeds=None)
        served = config.model_config.max_model_len
        places = torch.tensor(shifts(served), device=device)
        inside = torch.tensor(bucket_shifts(served, recipe.sequence), device=device)
        matrices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        spread: dict[str, KeyStatistics] = {}
        for name, one in run.statistics.items():
            module = run.rotary[name]
            if module is not None:
                if id(module) not in matrices:
                    means = turns(module, inside.flatten()).unflatten(0, inside.shape).mean(1)
                    matrices[id(module)] = turns(module, places), means
                one = one.spread(*matrices[id(module)], bucket_tokens(served))
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
