"""From the command line to vLLM's configuration: our names arrive unchanged, all others as if the plugin were absent."""

from __future__ import annotations

import pytest

from .conftest import EngineConfig
from .facts import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_reaches_the_configuration(preset: str, plugin: None, models: dict[str, str]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", models["llama"], "--kv-cache-dtype", preset])
    assert EngineArgs.from_cli_args(parsed).kv_cache_dtype == preset


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_else_changes(preset: str, engine_config: EngineConfig) -> None:
    config = engine_config(kv_cache_dtype=preset)
    assert config.cache_config.cache_dtype == preset
    # vLLM's own prefix rule would skip the first and last two layers and give up FlashAttention 3.
    assert not config.cache_config.kv_cache_dtype_skip_layers
    assert config.attention_config.flash_attn_version is None
    assert config.attention_config.backend is None, "a backend in the configuration does not unpickle in a worker"


@pytest.mark.parametrize("dtype", ["auto", "fp8", "bfloat16"])
def test_other_dtypes_are_unaffected(dtype: str, engine_config: EngineConfig) -> None:
    config = engine_config(kv_cache_dtype=dtype)
    assert config.cache_config.cache_dtype == dtype
    assert not config.cache_config.kv_cache_dtype_skip_layers


def test_other_dtypes_are_not_checked(engine_config: EngineConfig) -> None:
    """Settings, backends and models that our names refuse are vLLM's business under every other name."""
    engine_config(kv_cache_dtype="auto", additional_config={"turboquant": {"bogus": 1}})
    engine_config(kv_cache_dtype="auto", attention_backend="FLASH_ATTN")
    engine_config("alibi-always", kv_cache_dtype="auto")


def test_user_chosen_skip_layers_are_kept(engine_config: EngineConfig) -> None:
    config = engine_config(kv_cache_dtype_skip_layers=["0", "sliding_window"])
    assert config.cache_config.kv_cache_dtype_skip_layers == ["0", "sliding_window"]


def test_settings_are_optional(engine_config: EngineConfig) -> None:
    for settings in ({}, {"other-plugin": {"x": 1}}, {"turboquant": {}}, {"turboquant": {"calibration": "off"}}):
        assert engine_config(additional_config=settings).cache_config.cache_dtype == "turboquant"


def test_hybrid_models_are_accepted(engine_config: EngineConfig) -> None:
    assert engine_config("hybrid").model_config.is_hybrid
