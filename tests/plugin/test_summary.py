"""What is said after start-up, and pages of skipped layers beside windows, counted by vLLM's own planner."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from .conftest import EngineConfig
from .facts import slot_bytes
from .layers import Layer, build, plan, planned_specs, specs

MIB = 1 << 20
HEADS = 2
WINDOWED = [Layer(window=64), Layer()] * 3
# Tokens of whole blocks: less than one in a hundred is left over.
BLOCKS = 0.01


def fitted(config: Any, layers: list[Layer], on_gpu: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What layers ask for, and what is asked for in their name. on_gpu: after what vLLM does there about skipped layers."""
    from vllm.platforms import current_platform

    from vllm_turboquant.pages import fit, unaligned

    built = build(config, layers)
    if on_gpu and config.cache_config.kv_cache_dtype_skip_layers:
        current_platform._align_heterogeneous_kv_block_size(config, next(iter(built.values())).get_attn_backend())
    wanted = unaligned(specs(config, built), config)
    return wanted, fit(wanted, config)


@pytest.mark.parametrize("skip", [["0", "5"], ["sliding_window"], ["1", "3", "5"], ["0"], ["1"]], ids=" ".join)
@pytest.mark.parametrize("preset", ["turboquant", "turboquant-k8v4", "turboquant-k3v3", "turboquant-k2v2"])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_pages_beside_skipped_layers(on_gpu: bool, block: int, preset: str, skip: list[str], engine_config: EngineConfig) -> None:
    """Whichever layers are skipped, the first or not: pages differ from each other by less than a fifth, where vLLM's planner
    by itself would give every compressed layer the page of a skipped one."""
    config = engine_config(kv_cache_dtype=preset, kv_cache_dtype_skip_layers=skip, block_size=block, max_model_len=2048)
    wanted, asked = fitted(config, WINDOWED, on_gpu)
    unpadded = {spec.unpadded_page_size_bytes for spec in asked.values()}
    # k8v4 takes 1 / 2.64 of bf16: the worst of whole numbers of pages, 3, is 12% too large.
    assert 1 < len(unpadded) <= 2 and max(unpadded) < 1.15 * min(unpadded)
    final = planned_specs(plan(config, asked, 256 * MIB))
    for name, spec in final.items():
        token = HEADS * (512 if spec.state_content_bytes is None else slot_bytes(preset, 128))
        assert spec.page_size_bytes < 1.15 * spec.block_size * token, f"{name}, {wanted[name]}"


@pytest.mark.parametrize("skip", [[], ["0", "3"]], ids=["none", "some"])
@pytest.mark.parametrize("layers", [[Layer()] * 6, [Layer(window=64)] * 6], ids=["full", "windows"])
def test_layers_of_one_kind_are_left_alone(layers: list[Layer], skip: list[str], engine_config: EngineConfig) -> None:
    wanted, asked = fitted(engine_config(kv_cache_dtype_skip_layers=skip, block_size=32), layers)
    assert asked is wanted


def described(config: Any, layers: list[Layer]) -> tuple[str, Any]:
    from vllm_turboquant.summary import describe

    wanted, asked = fitted(config, layers)
    planned = plan(config, asked, 256 * MIB)
    return describe(config, planned, wanted, "calibration off"), planned


@pytest.mark.parametrize("skip", [[], ["1", "4"]], ids=["none", "some"])
def test_line_of_full_attention(skip: list[str], one_rank: None, engine_config: EngineConfig) -> None:
    """Layers, bytes, tokens: each against arithmetic of its own."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    config = engine_config(kv_cache_dtype_skip_layers=skip, block_size=32)
    line, planned = described(config, [Layer()] * 6)
    tokens, _ = get_kv_cache_capacity(config, planned)
    parts = line.split("; ")
    assert parts[0] == "turboquant"
    assert parts[1] == f"{6 - len(skip)} attention layers compressed (132 bytes per token and KV head of 128 dims)"
    names = ", ".join(f"model.layers.{index}.self_attn.attn" for index in skip)
    assert parts[2] == (f"2 not, by --kv-cache-dtype-skip-layers ({names})" if skip else "none left out")
    ours = HEADS * (132 * (6 - len(skip)) + 512 * len(skip))
    assert parts[3] == f"{ours:,} instead of 6,144 bytes per token ({6144 / ours:.2f}x)"
    auto = int(parts[4].rpartition(" ")[2].replace(",", ""))
    assert auto == pytest.approx(256 * MIB / 6144, rel=BLOCKS)
    assert parts[4] == f"{tokens:,} tokens, {tokens / auto:.2f}x of auto's {auto:,}"
    assert parts[5] == "calibration off"
    assert len(parts) == 6, "hits of the prefix cache are the engine core's to resolve"


@pytest.mark.parametrize("skip", [[], ["sliding_window"], ["1", "3", "5"]], ids=["none", "windows", "others"])
def test_tokens_against_auto_beside_windows(skip: list[str], one_rank: None, engine_config: EngineConfig) -> None:
    """The very number that an engine of dtype auto gets of the same memory."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    line, planned = described(engine_config(kv_cache_dtype_skip_layers=skip, block_size=32), WINDOWED)
    auto = engine_config(kv_cache_dtype="auto", block_size=32)
    theirs, _ = get_kv_cache_capacity(auto, plan(auto, specs(auto, build(auto, WINDOWED)), planned.kv_cache_tensors[0].size))
    assert f"x of auto's {theirs:,}; " in line, line


def test_line_reaches_the_metrics(engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a folder that the process of the arguments made; other dtypes have no such label."""
    from vllm_turboquant import status

    monkeypatch.delenv(status.ENVIRONMENT, raising=False)
    other = engine_config(kv_cache_dtype="auto")
    assert status.ENVIRONMENT not in os.environ and status.LABEL not in other.cache_config.metrics_info()
    ours = engine_config()
    assert ours.cache_config.metrics_info()[status.LABEL] == ""
    status.write("1-0", "second")
    status.write("0-0", "first")
    assert ours.cache_config.metrics_info()[status.LABEL] == "first | second"
    assert Path(os.environ[status.ENVIRONMENT]).is_dir()
    monkeypatch.setenv(status.ENVIRONMENT, "/no/such/folder")  # a worker on another machine
    status.write("0-0", "lost")
    assert status.read() == ""


DECLARED = {
    "compressed tensors": ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "float8"),
    "ModelOpt": ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, "FP8"),
    "weights only": ({"quant_method": "awq", "bits": 4, "kv_cache_scheme": None}, None),
}


@pytest.mark.parametrize("kind", DECLARED)
def test_what_a_checkpoint_says_of_its_cache(kind: str) -> None:
    from types import SimpleNamespace

    from vllm_turboquant.checkpoint import declared_cache

    described, words = DECLARED[kind]
    found = declared_cache(SimpleNamespace(hf_config=SimpleNamespace(quantization_config=described)))
    assert found is None if words is None else found is not None and found.endswith(f" {words}")
    assert declared_cache(SimpleNamespace(hf_config=SimpleNamespace())) is None


def test_checkpoint_of_its_own_cache_is_overruled_with_a_line(
    plugin: None, models: dict[str, str], engine_config: EngineConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import json

    config = json.loads((Path(models["llama"]) / "config.json").read_text())
    config["quantization_config"] = DECLARED["compressed tensors"][0] | {"format": "float-quantized", "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    models["declared"] = str(tmp_path)
    request.addfinalizer(lambda: models.pop("declared"))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.turboquant")
    logger.addHandler(handler)
    request.addfinalizer(lambda: logger.removeHandler(handler))
    assert engine_config("declared").cache_config.cache_dtype == "turboquant"
    asked = "--kv-cache-dtype turboquant was asked for."
    assert lines == [f"TurboQuant: the checkpoint's own KV cache, kv_cache_scheme float8, and its scales are ignored: {asked}"]
    engine_config("declared", kv_cache_dtype="auto")
    assert len(lines) == 1
