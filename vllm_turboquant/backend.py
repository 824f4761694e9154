"""The attention backend: facts and flags that vLLM's planner asks for. One class a preset; the class is the format."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from .config import BACKEND_NAME, FLAG, SERVE_PLAIN, refuse
from .impl import TurboQuantImpl, model_scale_group
from .kernels.format import (
    DEBUG_PRESETS,
    DEFAULT_PRESET,
    PRESETS,
    UNIT_TOKENS,
    page_format,
)
from .metadata import TurboQuantMetadataBuilder
from .refusals import MIN_CAPABILITY, has_page_format

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec


class TurboQuantBackend(AttentionBackend):
    """Decoder attention over TurboQuant pages ``[block, kv head, token, C]``, uint8."""

    turboquant_preset: ClassVar[str] = DEFAULT_PRESET
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @classmethod
    def get_impl_cls(cls) -> type[TurboQuantImpl]:  # type: ignore[override]
        return type("TurboQuantImpl", (TurboQuantImpl,), {"preset": cls.turboquant_preset})

    @staticmethod
    def get_builder_cls() -> type[TurboQuantMetadataBuilder]:
        return TurboQuantMetadataBuilder

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype == cls.turboquant_preset

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return has_page_format(head_size)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(UNIT_TOKENS)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A unit needs a head's tokens side by side, which both give; LBHNC first, as skipped layers on CPU demand it.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec with this preset's bytes per token and KV head. The dtype is set too: some layer kinds pass ``auto``."""
        if spec.head_size_v != spec.head_size:
            reason = f"keys of {spec.head_size} and values of {spec.head_size_v} dims have no common page format"
            raise refuse(FLAG, cls.turboquant_preset, reason, SERVE_PLAIN)
        fmt = page_format(cls.turboquant_preset, spec.head_size, model_scale_group(spec.head_size))
        return replace(spec, dtype=torch.uint8, state_content_bytes=fmt.slot_bytes)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or tuple(capability) >= MIN_CAPABILITY

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


_CLASSES: dict[str, type[TurboQuantBackend]] = {}
for _name in (*PRESETS, *DEBUG_PRESETS):
    if _name == DEFAULT_PRESET:
        _CLASSES[_name] = TurboQuantBackend
        continue
    # vLLM passes backends about as "module.Class" strings, so each class must be found in this module by its name.
    _class = "TurboQuantBackend_" + _name.removeprefix(DEFAULT_PRESET + "-").replace("-", "_")
    _CLASSES[_name] = type(_class, (TurboQuantBackend,), {"turboquant_preset": _name, "__module__": __name__})
    globals()[_class] = _CLASSES[_name]


def backend_class(preset: str) -> type[TurboQuantBackend]:
    """The backend of a registered dtype name."""
    return _CLASSES[preset]
