"""Fixtures around vLLM's own configuration, layers and planner. Which vLLM: the one that is imported (``test_vllm_033``)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .tiny import CONFIGS

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

EngineConfig = Callable[..., Any]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of a tiny model to its folder."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return {name: str(root / name) for name in CONFIGS}


@pytest.fixture(scope="session")
def plugin() -> None:
    """vLLM on its CPU platform with the plugin registered, as a general plugin would be."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this process has a GPU platform: test_vllm_033 runs these tests on the CPU platform")
    import vllm_turboquant

    vllm_turboquant.register()


@pytest.fixture
def engine_config(plugin: None, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """``engine_config(model="llama", **engine_args)`` is what vLLM makes of these arguments."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    # vLLM looks at a model class in a process of its own, to keep CUDA out of this one: 12 s each, and there is no CUDA.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())

    def create(model: str = "llama", kv_cache_dtype: str = "turboquant", **kwargs: Any) -> Any:
        arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "kv_cache_dtype": kv_cache_dtype, **kwargs}
        return EngineArgs(model=models[model], **arguments).create_engine_config()

    return create


@pytest.fixture(scope="module")
def one_rank(plugin: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's parallel linear layers ask for a tensor-parallel group; of one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with set_current_vllm_config(VllmConfig()):
        place = tmp_path_factory.mktemp("group") / "store"
        init_distributed_environment(1, 0, f"file://{place}", local_rank=0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()


def unpacked_033() -> Path:
    """The Python part of vLLM 0.33, which ``make test`` unpacks; ``TURBOQUANT_VLLM_033`` overrides the place."""
    return Path(os.environ.get("TURBOQUANT_VLLM_033") or Path(sys.prefix) / "vllm-0.33")


def require_033() -> Path:
    """:func:`unpacked_033`; skips where it is not unpacked, fails in CI."""
    code = unpacked_033()
    if not (code / "vllm" / "__init__.py").is_file():
        reason = f"no vLLM 0.33 in {code}: `make test` unpacks it there"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return code
