"""What of a GPU's memory is left for the KV cache: exact where it can be, and named an estimate where it cannot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

GIB = 2**30
# CUDA graphs, communication, what libraries keep, fragmentation; bytes. With it a Llama-3.1-8B on an H100 comes out as vLLM 0.33
# sized it there (tests/bench/results/engine_h100.jsonl), within 1% of the tokens.
_OTHER = 0.5 * GIB
_LOGIT_BYTES = 12  # float32 logits, probabilities and a sorted copy


@dataclass(frozen=True)
class Budget:
    """Bytes of one GPU.

    kv_cache: for the KV cache. weights: of one rank. weights_from: "parameters", of vLLM's own model, or "checkpoint", the
    files' share of a rank. total: of the GPU. utilization: the share of it that vLLM may take. working: activations of the
    largest step, CUDA graphs and libraries, an estimate. Without a total, kv_cache is what the user gave. checkpoint: weight
    files of the whole model, None where there are none.
    """

    kv_cache: int
    weights: int | None
    weights_from: str | None
    checkpoint: int | None
    total: int | None = None
    utilization: float | None = None
    working: int | None = None


def budget(config: Any, model: torch.nn.Module, exact: bool, gpu_memory: int | None, kv_cache_memory: int | None) -> Budget:
    """What `planner.Wanted` leaves for the cache. Raises ValueError where it cannot be told.

    config: VllmConfig. model: a rank's, on any device. exact: whether its parameters are stored as they will be served.
    """
    checkpoint = _checkpoint(config.model_config.model)
    weights = _weights(model) if exact else checkpoint and checkpoint // config.parallel_config.tensor_parallel_size
    origin = "parameters" if exact else "checkpoint" if checkpoint else None
    if kv_cache_memory is not None:
        return Budget(kv_cache_memory, weights, origin, checkpoint)
    if gpu_memory is None:
        if not current_platform.is_cuda():
            raise ValueError("this machine has no NVIDIA GPU: give --gpu-memory or --kv-cache-memory")
        gpu_memory = current_platform.get_device_total_memory()
    if weights is None:
        raise ValueError("the size of quantised weights is not known without their files: give --kv-cache-memory")
    share = config.cache_config.gpu_memory_utilization
    working = _working(config, model)
    left = ceil(gpu_memory * share) - weights - working
    if left <= 0:
        parts = f"{weights / GIB:.2f} GiB of weights and about {working / GIB:.2f} GiB of working memory"
        raise ValueError(f"nothing is left for the KV cache: {gpu_memory / GIB:.2f} GiB x {share:g} hold {parts}")
    return Budget(left, weights, origin, checkpoint, gpu_memory, share, working)


def _weights(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; those that share storage, as tied embeddings do, once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _checkpoint(folder: str) -> int | None:
    """Bytes of the weight files in a folder, None where there are none."""
    path = Path(folder)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text())["metadata"]["total_size"])
    for pattern in ("*.safetensors", "*.gguf", "*.bin"):
        if sizes := [file.stat().st_size for file in path.glob(pattern)]:
            return sum(sizes)
    return None


def _working(config: Any, model: torch.nn.Module) -> int:
    """Of the largest step: activations around the widest matrix, or the sampler's logits; then what is there all the time."""
    scheduler, facts = config.scheduler_config, config.model_config
    vocabulary, hidden = facts.get_vocab_size(), facts.get_hidden_size()
    experts = getattr(facts.hf_text_config, "num_experts_per_tok", None) or 1
    widths = [hidden]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            widths.append(parameter.shape[0])
        elif parameter.dim() == 3:  # [expert, rows, columns]
            widths.append(parameter.shape[1] * experts)
    # The widest matrix's output and half of it again, as gated layers have it; inputs, residuals, queries.
    activations = scheduler.max_num_batched_tokens * (max(widths) * 3 // 2 + 4 * hidden) * facts.dtype.itemsize
    logits = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens) * vocabulary * _LOGIT_BYTES
    return int(max(activations, logits) + _OTHER)
