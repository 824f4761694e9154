"""Without calibration: the part of the keys' mean that the weights tell, from the bias of a layer's key projection.

Keys of Qwen2-like models lie around a bias a hundred times as long as what tells them apart; a code spends its few bits on
the bias. Softmax does not see a constant in all keys, so it can be subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

from .kernels.basis import KeyBasis, key_basis
from .rotary import is_rotary, mean_turn

logger = init_logger("vllm.turboquant")


def bias_bases(model: torch.nn.Module, layers: Mapping[str, Any], max_model_len: int) -> dict[str, KeyBasis]:
    """The plain rotation with the mean that key biases have over positions ``0 .. max_model_len - 1``, for layers that have one.

    layers: attention modules by name, none of them with soft cap or sinks, which would see the subtracted constant.
    """
    positional = any(is_rotary(module) for module in model.modules())
    mean_turns: dict[int, torch.Tensor] = {}
    result: dict[str, KeyBasis] = {}
    for name, parent, _, bias in biased_layers(model, layers):
        rotary = [child for child in parent.children() if is_rotary(child)]
        # Which rotation the keys of such a layer get cannot be told from its modules.
        if len(rotary) > 1 or (positional and not rotary):
            continue
        mean = bias.float()
        if rotary:
            if id(rotary[0]) not in mean_turns:
                mean_turns[id(rotary[0])] = mean_turn(rotary[0], max_model_len).to(mean.device)
            mean = mean @ mean_turns[id(rotary[0])].T
        eye = torch.eye(mean.shape[1]).expand(len(mean), -1, -1)
        result[name] = key_basis(eye, mean)
    return result


def biased_layers(
    model: torch.nn.Module, layers: Mapping[str, Any]
) -> Iterator[tuple[str, torch.nn.Module, torch.Tensor, torch.Tensor]]:
    """Name, module around it and `projection_biases` of those of ``layers`` that have any."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    for name, layer in layers.items():
        parent = parents.get(id(layer))
        biases = None if parent is None else projection_biases(parent, layer.num_heads, layer.num_kv_heads, layer.head_size)
        if parent is not None and biases is not None:
            yield name, parent, *biases


def projection_biases(
    attention: torch.nn.Module, heads: int, kv_heads: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The biases of this rank's queries and keys, floating ``[Hq, d]`` and ``[Hk, d]``; None without one of the keys, and where a
    norm between it and attention moves it. Queries without bias have zeros.

    attention: the module around projection, rotary embedding and attention.
    """
    children = dict(attention.named_children())
    if any("norm" in name or type(child).__name__.endswith("Norm") for name, child in children.items()):
        return None
    fused = [child for child in children.values() if isinstance(child, QKVParallelLinear)]
    query, key = heads * head_size, kv_heads * head_size
    if len(fused) == 1 and fused[0].bias is not None:
        if len(fused[0].bias) != query + 2 * key:
            return None
        of_queries, of_keys = fused[0].bias[:query], fused[0].bias[query : query + key]
    else:
        single, other = children.get("k_proj"), children.get("q_proj")
        if not isinstance(single, ColumnParallelLinear) or single.bias is None or len(single.bias) != key:
            return None
        of_keys = single.bias
        biased = isinstance(other, ColumnParallelLinear) and other.bias is not None and len(other.bias) == query
        of_queries = other.bias if biased else of_keys.new_zeros(query)  # type: ignore[union-attr]
    if not of_keys.any():
        return None
    return of_queries.detach().view(heads, head_size), of_keys.detach().view(kv_heads, head_size)
