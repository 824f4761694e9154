"""Where vLLM's cache update, which is given slots alone, learns what else is known of the tokens that it stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

from .config import FLAG, refuse

if TYPE_CHECKING:
    from .metadata import TurboQuantMetadata


def step_metadata(layer_name: str, preset: str) -> TurboQuantMetadata | None:
    """Metadata of this forward pass; None in a run without, whose slots are all padding. Raises TurboQuantError where such a run
    is captured.

    The update op runs under the same forward context as attention does: by default it is an op at which vLLM splits its graph, so
    it runs uncaptured, between piecewise graphs; a full graph is captured with metadata, whose tensors are views of persistent
    buffers, filled before each replay.
    """
    from vllm.model_executor.layers.attention.attention import get_attention_context

    meta: TurboQuantMetadata | None = get_attention_context(layer_name)[0]
    if meta is not None:
        return meta
    if current_platform.is_cuda() and torch.cuda.is_current_stream_capturing():
        # What is captured now would be replayed for tokens that are not padding.
        reason = "a layer's cache update is captured without attention metadata, which tells what to store how"
        raise refuse(FLAG, preset, reason, "leave vllm::unified_kv_cache_update among the splitting ops")
    return None
