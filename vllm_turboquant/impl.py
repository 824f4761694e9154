"""Attention over compressed pages: update stores, forward attends. The arithmetic is in ``kernels``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from .config import FLAG, SERVE_PLAIN, refuse
from .kernels import recent_reference, reference
from .kernels.basis import KeyBasis
from .kernels.format import DEFAULT_PRESET, PageFormat, page_format, scale_group
from .kernels.recent_claim import RecentUnits
from .refusals import check_prefill
from .step import step_metadata

if TYPE_CHECKING:
    from .metadata import TurboQuantMetadata
    from .recent import RecentPools

# Head sizes of the compressed layers of the model that this process builds, draft layers included. vLLM asks a backend
# class for a layer's bytes without naming the model, and bytes must be proportional to the head size within one model.
_HEAD_SIZES: set[int] = set()


def model_scale_group(head_size: int) -> int:
    """The scale group of a layer with ``head_size``, common to all layers of the model built last."""
    return scale_group(head_size, *_HEAD_SIZES)


def _note_head_size(head_size: int) -> None:
    if not compressed_layers(get_current_vllm_config()):
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
        if current_platform.is_cuda():
            check_prefill(self.preset, head_size)
        if alibi_slopes is not None:
            raise refuse(
                FLAG,
                self.preset,
                "ALiBi position biases are not computed",
                SERVE_PLAIN,
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
        # How keys are stored, in all pages of this layer; None is the plain rotation. Calibration sets it before there are pages.
        self.basis: KeyBasis | None = None
        # Where the newest tokens are kept exactly; None for presets without recent window, and where it cannot be.
        self.recent: RecentPools | None = None
        # Page sizes for which warm-up found a CUDA kernel usable; the portable ones serve the others.
        self.cuda_decode_pages: set[int] = set()
        self.cuda_context_pages: set[int] = set()
        self.cuda_store_pages: set[int] = set()
        # Kept, because vLLM's model runners do not all set it around their dummy runs.
        self.vllm_config = get_current_vllm_config()
        _note_head_size(head_size)

    @cached_property
    def format(self) -> PageFormat:
        """Known once all layers of the model exist, which is before the first token."""
        return page_format(self.preset, self.head_size, model_scale_group(self.head_size))

    @cached_property
    def flash_attention(self) -> int:
        """The version of FlashAttention that prefills use."""
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=self.head_size)
        assert version is not None, "vLLM's FlashAttention is missing"
        return version

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores new tokens: key, value ``[T', Hk, d]``, pages uint8 ``[B, Hk, N, C]``, slot_mapping int64 ``[T]``."""
        positions: torch.Tensor | None = None
        recent: RecentUnits | None = None
        by_position = self.basis is not None and self.basis.buckets > 1
        if by_position or self.recent is not None:
            meta = step_metadata(layer.layer_name, self.preset)
            if meta is None:
                return
            recent = meta.recent
            if by_position:
                assert meta.positions is not None, "the metadata builder refuses batches without"
                # Slots may be padded further, with -1.
                slot_mapping = slot_mapping[: len(meta.positions)]
                positions = meta.positions[: len(slot_mapping)]
        if key.is_cuda:
            from .kernels.recent_keep import keep

            store = self.store_kernel(kv_cache.shape[2], len(slot_mapping))
        else:
            store, keep = reference.store, recent_reference.keep
        store(key, value, kv_cache, slot_mapping, self.format, self.basis, positions)
        if self.recent is not None and recent is not None:
            mean = None if self.basis is None else self.basis.mean
            keep(key, value, slot_mapping, self.recent.key, self.recent.value, recent.frame_of, mean)

    def store_kernel(self, block_size: int, tokens: int) -> Callable[..., None]:
        """The faster one on a GPU: a lane of the CUDA store has two dims of small heads, which costs where tokens are many."""
        from .kernels import store as portable
        from .kernels.cuda import store as cuda

        small = self.head_size == 64 and tokens > portable.FEW_TOKENS
        return portable.store if small or block_size not in self.cuda_store_pages else cuda.store

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
            if query.is_cuda:
                from .workspace import reserve

                reserve(self.vllm_config, query.device)
            return output.fill_(0)
        tokens = attn_metadata.num_actual_tokens
        q = query[:tokens].view(tokens, self.num_heads, self.head_size)
        out = output[:tokens].view(tokens, self.num_heads, self.head_size)
        if query.is_cuda:
            self._forward_gpu(q, key, value, kv_cache, attn_metadata, out)
        else:
            self._forward_cpu(q, kv_cache, attn_metadata, out)
        return output

    def _forward_cpu(self, query: torch.Tensor, kv_cache: torch.Tensor, meta: TurboQuantMetadata, out: torch.Tensor) -> None:
        recent = None
        if self.recent is not None and meta.recent is not None:
            recent = recent_reference.Recent(self.recent.key, self.recent.value, meta.recent.frame_of, meta.recent.ends)
        attended = reference.attend(
            query,
            kv_cache,
            meta.block_table,
            meta.seq_lens,
            meta.query_start_loc,
            self.format,
            self.scale,
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            basis=self.basis,
            recent=recent,
            # Not for accuracy: rows must not depend on the batch that they are computed in, or the next layer's codes would.
            dtype=torch.float64,
        )
        out.copy_(attended)

    def _forward_gpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        meta: TurboQuantMetadata,
        out: torch.Tensor,
    ) -> None:
        if meta.decodes:
            from .decode import attend_decode

            n = meta.decode_tokens
            table, lengths, starts = meta.block_table, meta.seq_lens, meta.query_start_loc
            batch = table[: meta.decodes], lengths[: meta.decodes], starts[: meta.decodes + 1]
            attend_decode(self, query[:n], kv_cache, *batch, out[:n], meta.max_query_len, meta.recent)
        if meta.prefill is not None:
            from .prefill import attend_prefill

            rows = slice(meta.prefill.start, meta.prefill.start + meta.prefill.tokens)
            raw = None if key is None or value is None else (key[rows], value[rows])
            attend_prefill(self, meta.prefill, query[rows], raw, kv_cache, meta.block_table, out[rows])


def compressed_layers(vllm_config: VllmConfig, names: Collection[str] | None = None) -> list[TurboQuantImpl]:
    """The implementations of all compressed layers that exist so far, draft layers included; or of those in ``names``."""
    layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    impls = [getattr(layer, "impl", None) for name, layer in layers.items() if names is None or name in names]
    return [impl for impl in impls if isinstance(impl, TurboQuantImpl)]


def shared_layers(vllm_config: VllmConfig) -> dict[str, str]:
    """Attention layers that read another layer's cache, a drafter's included, and the name of that one."""
    layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    targets = {name: getattr(layer, "kv_sharing_target_layer_name", None) for name, layer in layers.items()}
    return {name: target for name, target in targets.items() if target is not None}
