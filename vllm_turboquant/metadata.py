"""Per-batch metadata: references to vLLM's own tensors, and for prefills a plan made once a step for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from .config import FLAG, OFF, refuse
from .impl import compressed_layers, shared_layers
from .kernels.recent_claim import RecentUnits
from .plan import PrefillPlan, drafts_with_a_model, plan_prefill
from .recent import RecentWindow, reserve_pools

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass
class TurboQuantMetadata(AttentionMetadata):
    """What one forward pass needs. Requests stand decodes first: ``decodes`` of them, with ``decode_tokens`` tokens.

    query_start_loc: int32 ``[R + 1]``. seq_lens: int32 ``[R]``, new tokens included. block_table: int32 ``[R, blocks]``.
    slot_mapping: int64 ``[T]``, -1 for padding. positions: int64 ``[T]``, of tokens in their sequences; None only where no
    layer's keys are stored by position. max_query_len: a bound for decodes, the same in every step. prefill: None without
    prefills and on a CPU, where one path serves all. recent: which newest tokens are also kept exactly, claimed for this step;
    None where none are.
    """

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor | None
    decodes: int
    decode_tokens: int
    max_query_len: int
    prefill: PrefillPlan | None
    recent: RecentUnits | None = None


class TurboQuantMetadataBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    # Metadata is references to persistent tensors, so a drafter's graph needs no refresh between its steps.
    supports_draft_decode_metadata_update = True

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.on_gpu = device.type == "cuda"
        self.inexact = 0
        writers = set(layer_names) - shared_layers(vllm_config).keys()
        bases = [impl.basis for impl in compressed_layers(vllm_config, writers)]
        self.by_position = any(basis is not None and basis.buckets > 1 for basis in bases)
        reserve_pools(vllm_config, device)
        self.recent = RecentWindow.of(vllm_config, layer_names, device)
        if self.on_gpu:
            from .warmup import warm_up
            from .workspace import max_query_len, reserve

            self.reorder_batch_threshold = max_query_len(vllm_config)
            if drafts_with_a_model(vllm_config):
                self.inexact = self.reorder_batch_threshold
            reserve(vllm_config, device)
            warm_up(vllm_config, layer_names, kv_cache_spec.block_size, self.reorder_batch_threshold, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Uniform batches of 1 + K tokens replay from a graph; the CPU path reads lengths on the host."""
        return AttentionCGSupport.UNIFORM_BATCH if current_platform.is_cuda() else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TurboQuantMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            dtype = self.vllm_config.cache_config.cache_dtype
            reason = "a layer of this model or its drafter attends without causal mask, which is not computed"
            raise refuse(FLAG, dtype, reason, "use another drafter or --kv-cache-dtype auto")
        if self.by_position and (common.positions is None or common.positions.ndim != 1):
            # As where a batch is cut into micro-batches, or chunked local attention makes sequences of its own.
            dtype = self.vllm_config.cache_config.cache_dtype
            reason = "this batch comes without its tokens' positions, by which calibrated keys are stored"
            raise refuse(FLAG, dtype, reason, f'set "calibration" to "{OFF}"')
        decodes, prefills, decode_tokens, prefill = common.num_reqs, 0, common.num_actual_tokens, None
        threshold = self.reorder_batch_threshold or 1
        if self.on_gpu:
            decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=threshold)
        recent = None
        if self.recent is not None:
            recent = self.recent.claim(
                common.block_table_tensor,
                common.seq_lens,
                common.query_start_loc,
                common.slot_mapping[: common.num_actual_tokens],
            )
        if prefills:
            prefill = plan_prefill(common, decodes, self.inexact)
        return TurboQuantMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            positions=common.positions,
            decodes=decodes,
            decode_tokens=decode_tokens,
            max_query_len=threshold,
            prefill=prefill,
            recent=recent,
        )

    def update_draft_decode_metadata(self, metadata: TurboQuantMetadata) -> None:
        """Nothing to do: kernels read the persistent tensors themselves."""
