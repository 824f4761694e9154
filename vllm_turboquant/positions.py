"""Where vLLM's cache update, which is given slots alone, learns the positions of the tokens that it stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

from .config import FLAG, refuse

if TYPE_CHECKING:
    from .metadata import TurboQuantMetadata


def token_positions(layer_name: str, preset: str) -> torch.Tensor | None:
    """Positions of the tokens of this forward pass, int64 ``[>= num_actual_tokens]``; None in a run without metadata, whose slots
    are all padding. Raises TurboQuantError where such a run is captured.

    The update op runs under the same forward context as attention does: by default it is an op at which vLLM splits its graph, so
    it runs uncaptured, between piecewise graphs; a full graph is captured with metadata, whose positions are a view of the model
    runner's persistent buffer, which it fills before each replay.
    """
    from vllm.model_executor.layers.attention.attention import get_attention_context

    meta: TurboQuantMetadata | None = get_attention_context(layer_name)[0]
    if meta is not None:
        assert meta.positions is not None, "the metadata builder refuses batches without"
        return meta.positions
    if current_platform.is_cuda() and torch.cuda.is_current_stream_capturing():
        # What is captured now would be replayed for tokens that are not padding.
        reason = "a calibrated layer's cache update is captured without attention metadata, which tells positions"
        raise refuse(FLAG, preset, reason, "leave vllm::unified_kv_cache_update among the splitting ops")
    return None
