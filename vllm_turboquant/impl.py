"""Attention over compressed pages: update stores, forward attends. The arithmetic is in ``kernels``."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from .config import FLAG, refuse
from .kernels import reference
from .kernels.format import DEFAULT_PRESET, PageFormat, page_format, scale_group

if TYPE_CHECKING:
    from .metadata import TurboQuantMetadata

# Head sizes of the compressed layers of the model that this process builds, draft layers included. vLLM asks a backend
# class for a layer's bytes without naming the model, and bytes must be proportional to the head size within one model.
_HEAD_SIZES: set[int] = set()


def model_scale_group(head_size: int) -> int:
    """The scale group of a layer with ``head_size``, common to all layers of the model built last."""
    return scale_group(head_size, *_HEAD_SIZES)


def _note_head_size(head_size: int) -> None:
    layers: dict[str, Any] = get_current_vllm_config().compilation_config.static_forward_context
    if not any(isinstance(getattr(layer, "impl", None), TurboQuantImpl) for layer in layers.values()):
        _HEAD_SIZES.clear()  # the first layer of a new model
    _HEAD_SIZES.add(head_size)


class TurboQuantImpl(AttentionImpl):
    """One attention layer. ``preset`` is set by the backend class; ``kv_cache_dtype`` may read ``auto`` here."""

    preset: ClassVar[str] = DEFAULT_PRESET

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = DEFAULT_PRESET,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise refuse(
                FLAG,
                self.preset,
                "ALiBi position biases are not computed",
                "serve this model with --kv-cache-dtype auto",
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        _note_head_size(head_size)

    @cached_property
    def format(self) -> PageFormat:
        """Known once all layers of the model exist, which is before the first token."""
        return page_format(self.preset, self.head_size, model_scale_group(self.head_size))

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores new tokens: key, value ``[T', Hk, d]``, pages uint8 ``[B, Hk, N, C]``, slot_mapping int64 ``[T]``."""
        reference.store(key, value, kv_cache, slot_mapping, self.format)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TurboQuantMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes attention of query ``[T', Hq, d]`` over the pages into ``output``; ``None`` metadata is a profiling run."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not offered by this backend")
        if attn_metadata is None:
            return output.fill_(0)
        tokens = attn_metadata.num_actual_tokens
        attended = reference.attend(
            query[:tokens].view(tokens, self.num_heads, self.head_size),
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            self.format,
            self.scale,
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            dtype=torch.float32,
        )
        output[:tokens].copy_(attended.view_as(output[:tokens]))
        return output
