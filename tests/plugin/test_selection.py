"""Which layer gets which backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_turboquant.config import TurboQuantError

from .conftest import EngineConfig
from .facts import PRESETS, slot_bytes
from .layers import Layer, build, specs


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layer_is_compressed_by_default(preset: str, engine_config: EngineConfig) -> None:
    config = engine_config(kv_cache_dtype=preset)
    built = build(config, [Layer(), Layer(window=64)] * 3)
    for name, spec in specs(config, built).items():
        assert built[name].get_attn_backend().turboquant_preset == preset
        assert spec.page_size_bytes == spec.block_size * 2 * slot_bytes(preset, 128), name


@pytest.mark.parametrize("skip", [["0", "5"], ["sliding_window"]])
def test_skipped_layers_keep_vllms_backend(skip: list[str], engine_config: EngineConfig) -> None:
    config = engine_config(kv_cache_dtype_skip_layers=skip)
    layers = [Layer(window=64), *[Layer()] * 4, Layer(window=64)]
    names = [layer.get_attn_backend().get_name() for layer in build(config, layers).values()]
    assert names == ["CPU_ATTN", *["VLLM_TURBOQUANT"] * 4, "CPU_ATTN"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_other_dtypes_keep_vllms_backend(dtype: str, engine_config: EngineConfig) -> None:
    config = engine_config(kv_cache_dtype=dtype)
    built = build(config, [Layer(), Layer(window=64)])
    assert [layer.get_attn_backend().get_name() for layer in built.values()] == ["CPU_ATTN"] * 2
    for spec in specs(config, built).values():
        assert spec.page_size_bytes == spec.block_size * 1024  # 2 heads of 128 dims, K and V in bf16


class FakeCuda:
    """Stands for a CUDA platform: says what it was asked and leaves everything else to nobody."""

    capability: tuple[int, int] = (9, 0)

    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        return f"vLLM's choice for {attn_selector_config.kv_cache_dtype}"

    @classmethod
    def get_device_capability(cls) -> tuple[int, int]:
        return cls.capability

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True


def _select(monkeypatch: pytest.MonkeyPatch, dtype: str, backend: Any = None, **facts: Any) -> str:
    import torch
    from vllm import platforms
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from vllm_turboquant import compat

    platform = type("FakeCuda", (FakeCuda,), {"get_attn_backend_cls": FakeCuda.__dict__["get_attn_backend_cls"]})()
    monkeypatch.setattr(platforms, "current_platform", platform)
    compat._wrap_backend_selection()
    facts = {"head_size": 128, "dtype": torch.bfloat16, "block_size": 16, **facts}
    asked = AttentionSelectorConfig(kv_cache_dtype=dtype, **facts)  # type: ignore[arg-type]
    return platform.get_attn_backend_cls(backend, attn_selector_config=asked, num_heads=8)


OTHERS = ("auto", "fp8", "turboquant_4bit_nc", "turboquant_k8v4", "turboquant_k3v4_nc", "turboquant_3bit_nc")


@pytest.mark.parametrize("dtype", OTHERS)
def test_on_cuda_other_names_are_vllms(dtype: str, plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _select(monkeypatch, dtype) == f"vLLM's choice for {dtype}"
    from vllm_turboquant.refusals import check_engine_args

    none = dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"))
    arguments = SimpleNamespace(kv_cache_dtype=dtype, **none)
    check_engine_args(arguments, None, FakeCuda())  # looks no further than the name, else None would break it


@pytest.mark.parametrize("preset", PRESETS)
def test_on_cuda_our_names_are_ours(preset: str, plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    backend = resolve_obj_by_qualname(_select(monkeypatch, preset))
    assert backend.turboquant_preset == preset and backend.get_name() == "VLLM_TURBOQUANT"


@pytest.mark.parametrize(
    "facts",
    [{"use_mla": True}, {"head_size": 24}, {"use_mm_prefix": True}, {"attn_type": "encoder"}, {"use_dcp": True}],
    ids=str,
)
def test_layers_without_format_are_refused(facts: dict[str, Any], plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TurboQuantError, match=r"^--kv-cache-dtype turboquant: .*; use --kv-cache-dtype auto\.$"):
        _select(monkeypatch, "turboquant", **facts)


def test_a_backend_that_vllm_names_for_the_model_serves_other_layers_only(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM names one for models of mixed head sizes; one that the user names is refused before (test_refusals)."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert "choice for auto" in _select(monkeypatch, "auto", AttentionBackendEnum.FLASH_ATTN)
    assert "TurboQuantBackend" in _select(monkeypatch, "turboquant", AttentionBackendEnum.FLASH_ATTN)
