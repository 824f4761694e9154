"""Refusals as Python sees them: a TurboQuantError with one sentence, before vLLM's own validation and before any process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_turboquant.config import TurboQuantError

from .conftest import EngineConfig
from .refused import REFUSALS, check_sentence


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_by_the_configuration(case: str, engine_config: EngineConfig) -> None:
    refusal = REFUSALS[case]
    with pytest.raises(TurboQuantError) as caught:
        engine_config(refusal.model, **refusal.args)
    check_sentence(str(caught.value), refusal.parts)


@pytest.mark.parametrize("case", ["wrong preset", "built-in 4bit_nc", "DCP", "unknown setting", "LMCache", "MLA"])
def test_refused_by_llm(case: str, engine_config: EngineConfig, models: dict[str, str]) -> None:
    """The Python API; ``engine_config`` is here for what it sets up."""
    from vllm import LLM

    refusal = REFUSALS[case]
    arguments: dict[str, Any] = {"kv_cache_dtype": "turboquant", "skip_tokenizer_init": True, **refusal.args}
    with pytest.raises(TurboQuantError) as caught:
        LLM(model=models[refusal.model], **arguments)
    check_sentence(str(caught.value), refusal.parts)


def test_every_connector_but_lmcache_passes(engine_config: EngineConfig, tmp_path: Path) -> None:
    assert engine_config(**sharing(tmp_path / "new")).cache_config.cache_dtype == "turboquant"


def sharing(folder: Path, **more: Any) -> dict[str, Any]:
    extra = {"shared_storage_path": str(folder)}
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return {"kv_transfer_config": connector, "additional_config": {"turboquant": {"calibration": "off"}}, **more}


def test_shared_storage_of_other_pages(engine_config: EngineConfig, tmp_path: Path) -> None:
    """vLLM's connector finds blocks by their tokens: what else they depend on is marked in the folder."""
    engine_config(**sharing(tmp_path))
    engine_config(**sharing(tmp_path))
    changes = {
        "kv_cache_dtype turboquant, not turboquant-k8v4": {"kv_cache_dtype": "turboquant-k8v4"},
        "block_size None, not 64": {"block_size": 64},
        "model_dtype bfloat16, not float32": {"dtype": "float32"},
        "tensor_parallel_size 1, not 2": {"tensor_parallel_size": 2},
    }
    for words, change in changes.items():
        with pytest.raises(TurboQuantError) as caught:
            engine_config(**sharing(tmp_path, **change))
        check_sentence(
            str(caught.value), ("--kv-cache-dtype", f"shared storage {tmp_path} holds pages of {words}", "empty folder")
        )
    raw = tmp_path / "raw"
    (raw / ("0f" * 16)).mkdir(parents=True)
    (raw / ("0f" * 16) / "model.layers.0.safetensors").touch()
    with pytest.raises(TurboQuantError) as caught:
        engine_config(**sharing(raw))
    check_sentence(str(caught.value), ("--kv-cache-dtype turboquant", f"{raw} holds pages of another dtype", "empty folder"))


@pytest.mark.parametrize(
    ("cuda", "capability", "parts"),
    [
        (True, (7, 5), ("--kv-cache-dtype turboquant", "needs compute capability 8.0", "this GPU has 7.5", "auto.")),
        (False, (9, 4), ("--kv-cache-dtype turboquant", "CPU and NVIDIA GPUs, not on Fake", "auto.")),
        (True, (8, 0), ()),
        (True, (12, 0), ()),
    ],
)
def test_hardware(cuda: bool, capability: tuple[int, int], parts: tuple[str, ...]) -> None:
    from vllm_turboquant.refusals import check_platform

    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: cuda, device_name="Fake", get_device_capability=lambda: capability
    )
    if not parts:
        check_platform("turboquant", platform)
        return
    with pytest.raises(TurboQuantError) as caught:
        check_platform("turboquant", platform)
    check_sentence(str(caught.value), parts)


def test_excepthook_prints_only_our_sentences(plugin: None, capsys: pytest.CaptureFixture) -> None:
    import sys

    from vllm_turboquant import compat
    from vllm_turboquant.config import refuse

    seen: list[type] = []
    installed = sys.excepthook
    sys.excepthook = lambda kind, error, trace: seen.append(kind)
    try:
        compat._chain_excepthook()
        sys.excepthook(TurboQuantError, refuse("--flag", "value", "reason", "remedy"), None)
        sys.excepthook(ValueError, ValueError("other"), None)
    finally:
        sys.excepthook = installed
    assert capsys.readouterr().err == "vllm: error: --flag value: reason; remedy.\n"
    assert seen == [ValueError]


MISSING_FA = "FA2 is unavailable due to: no library"
# Head size, dtype, why there is no FlashAttention, which one there is for large heads, the sentence.
GPU_REFUSALS = {
    "served": (256, torch.bfloat16, None, 3, ()),
    "half": (64, torch.float16, None, 2, ()),
    "large heads on Hopper": (512, torch.bfloat16, None, 4, ()),
    "large heads elsewhere": (512, torch.bfloat16, None, 2, ("heads of 512", "Hopper GPUs alone", "up to 256", "auto.")),
    "large heads in some layers": (512, torch.bfloat16, None, 3, ("heads of 512", "Hopper GPUs alone", "up to 256", "auto.")),
    "head size": (528, torch.bfloat16, None, 4, ("head size 528", "up to 512", "--kv-cache-dtype auto.")),
    "float32": (128, torch.float32, None, 3, ("--dtype float32 on a GPU", "bfloat16 and float16", "use --dtype bfloat16.")),
    "no FlashAttention": (128, torch.bfloat16, MISSING_FA, 2, ("needs FlashAttention", MISSING_FA, "vLLM's CUDA wheel")),
}


@pytest.mark.parametrize("case", GPU_REFUSALS)
def test_models_on_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import fa_utils

    from vllm_turboquant import refusals

    size, dtype, missing, version, parts = GPU_REFUSALS[case]
    kinds = ("is_attention_free", "is_encoder_decoder", "use_mla", "is_mm_prefix_lm", "is_diffusion", "uses_alibi")
    no = dict.fromkeys(kinds, False)
    some = case == "large heads in some layers"
    text = SimpleNamespace(global_head_dim=size if some else None)
    model = SimpleNamespace(
        model="M", runner_type="generate", architecture="LlamaForCausalLM", architectures=["LlamaForCausalLM"], dtype=dtype, **no
    )
    model.hf_text_config = model.hf_config = text
    model.get_head_size = lambda: 256 if some else size
    gpu = SimpleNamespace(is_cuda=lambda: True)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: version)
    monkeypatch.setattr(refusals, "missing_flash_attention", lambda: missing)
    if not parts:
        refusals._check_model("turboquant", model, gpu)
        return
    with pytest.raises(TurboQuantError) as caught:
        refusals._check_model("turboquant", model, gpu)
    check_sentence(str(caught.value), ("--kv-cache-dtype turboquant", *parts))


def test_flash_attention_missing_from_this_installation(plugin: None) -> None:
    """vLLM's CPU build has none: the reason is told instead of raised."""
    from vllm_turboquant.refusals import missing_flash_attention

    assert missing_flash_attention()
