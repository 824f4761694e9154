"""``vllm-turboquant plan``: bytes, tokens and refusals against arithmetic of its own, from configurations alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest

from .facts import PRESETS, slot_bytes

MODELS = Path(__file__).parent / "models"
GIB = 2**30

Planner = Callable[..., Any]


@dataclass(frozen=True)
class Known:
    """What a model card and a config.json say. parameters: of the whole model."""

    name: str
    parameters: int
    layers: int
    kv_heads: int
    full: int

    @property
    def folder(self) -> str:
        return str(MODELS / self.name)

    def token_bytes(self, dtype: str, tensor_parallel_size: int = 1) -> int:
        head = {"auto": 512, "fp8": 256}[dtype] if dtype in ("auto", "fp8") else slot_bytes(dtype, 128)
        return self.layers * self.kv_heads // tensor_parallel_size * head


LLAMA = Known("Llama-3.1-8B", 8_030_261_248, 32, 8, 131072)
QWEN = Known("Qwen3-32B", 32_762_123_264, 64, 8, 40960)
CODER = Known("Qwen2.5-Coder-1.5B-Instruct", 1_543_714_304, 28, 2, 32768)
KNOWN = pytest.mark.parametrize("known", [LLAMA, QWEN, CODER], ids=lambda known: known.name)


@pytest.fixture
def planner(plugin: None, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """``planner(folder, gpu_memory=..., kv_cache_memory=..., **engine_args)``."""
    from vllm.model_executor.models import registry

    from vllm_turboquant.planner import Wanted, plan

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())  # as conftest has it

    def run(model: str, gpu_memory: int | None = None, kv_cache_memory: int | None = None, **engine: Any) -> Any:
        return plan(Wanted({"model": model, **engine}, gpu_memory, kv_cache_memory))

    return run


def by_dtype(plan: Any) -> dict[str, Any]:
    return {row.dtype: row for row in plan.rows}


@KNOWN
def test_tokens_are_memory_over_bytes(known: Known, planner: Planner, seed: int) -> None:
    """Full attention in blocks of 16: vLLM logs what whole blocks hold, in requests of the full length."""
    rng = random.Random(seed)
    size = rng.choice([size for size in (1, 2, 4, 8) if known.kv_heads % size == 0])
    memory = rng.randrange(30 * GIB, 60 * GIB)
    found = by_dtype(planner(known.folder, 80 * GIB, memory, tensor_parallel_size=size))
    assert set(found) == {"auto", "fp8", *PRESETS}
    for dtype, row in found.items():
        blocks = floor(memory / (16 * known.token_bytes(dtype, size)))
        requests = blocks / ceil(known.full / 16)
        assert (row.problem, row.block_size, row.longest) == (None, 16, known.full), dtype
        assert row.requests == pytest.approx(requests, rel=1e-12), dtype
        assert row.tokens == int(requests * known.full), dtype
        # Tokens are cut to whole ones.
        assert row.bytes_per_token == pytest.approx(known.token_bytes(dtype, size), rel=1e-5), dtype


@KNOWN
@pytest.mark.parametrize("size", [1, 2])
def test_weights_are_those_of_the_model_card(known: Known, size: int, planner: Planner) -> None:
    """A rank's share: matrices are divided, norms and the table of positions are not, which is less than 1%."""
    budget = planner(known.folder, 80 * GIB, tensor_parallel_size=size).budget
    assert budget.weights_from == "parameters"
    assert budget.weights == pytest.approx(2 * known.parameters / size, rel=0.01)
    assert budget.weights > 2 * known.parameters / size
    assert (budget.total, budget.utilization) == (80 * GIB, 0.92)
    assert budget.kv_cache == ceil(80 * GIB * 0.92) - budget.weights - budget.working


@pytest.mark.parametrize("requests", (32, 1000))
def test_exact_newest_tokens_lie_beside_the_cache(requests: int, planner: Planner) -> None:
    """64 tokens, in five units of 16 at most, of at most 256 requests: keys and values in bf16."""
    plan = planner(LLAMA.folder, 80 * GIB, max_num_seqs=requests)
    for dtype, row in by_dtype(plan).items():
        beside = LLAMA.token_bytes("auto") * 80 * min(requests, 256) if dtype in ("turboquant-k3v3", "turboquant-k2v2") else 0
        blocks = floor((plan.budget.kv_cache - beside) / (16 * LLAMA.token_bytes(dtype)))
        assert row.requests == pytest.approx(blocks / (LLAMA.full // 16), rel=1e-12), dtype


def test_estimate_against_the_h100(planner: Planner) -> None:
    """What tests/bench/engine.py saw there, of 79.1 GiB, with its arguments. 2%: working memory is an estimate."""
    rows = map(json.loads, (Path(__file__).parents[1] / "bench" / "results" / "engine_h100.jsonl").read_text().splitlines())
    seen = {row["dtype"]: row["capacity_tokens"] for row in rows}
    options = {"gpu_memory_utilization": 0.88, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 33000}
    found = by_dtype(planner(LLAMA.folder, int(79.1 * GIB), **options))
    for dtype in ("auto", "turboquant"):
        assert found[dtype].tokens == pytest.approx(seen[dtype], rel=0.02), dtype


def test_sliding_windows(planner: Planner, seed: int) -> None:
    """Gemma 3 270M: 3 layers of full attention and 15 of window 512, in groups of 3 layers that share a pool of blocks.

    A window's group holds what a step of 8192 tokens needs, and a block more, as neither end of a window need be a block's.
    """
    memory = random.Random(seed).randrange(4 * GIB, 60 * GIB)
    result = planner(str(MODELS / "gemma-3-270m-it"), 80 * GIB, memory)
    assert result.budget.weights == pytest.approx(2 * 268_098_176, rel=0.1)  # the table of positions is 8% here
    a_request = ceil(32768 / 16) + 5 * (ceil((511 + 8192) / 16) + 1)
    for dtype, row in by_dtype(result).items():
        head = {"auto": 1024, "fp8": 512}[dtype] if dtype in ("auto", "fp8") else slot_bytes(dtype, 256)
        requests = (memory // (3 * 16 * head)) / a_request
        assert row.requests == pytest.approx(requests, rel=1e-12), dtype
        assert row.tokens == int(requests * 32768), dtype
        assert row.bytes_per_token == pytest.approx(memory / row.tokens, rel=1e-3), dtype  # less than a block is left over


def test_defaults_are_those_of_a_gpu(planner: Planner) -> None:
    """This process has a CPU: its blocks of 128 tokens and steps of 2048 are not what a GPU of 80 or 24 GiB would get."""
    large, small = planner(LLAMA.folder, 80 * GIB, GIB), planner(LLAMA.folder, 24 * GIB, GIB)
    here = planner(LLAMA.folder, None, GIB)
    assert (large.platform, large.max_num_batched_tokens, large.rows[0].block_size) == ("gpu", 8192, 16)
    assert (small.platform, small.max_num_batched_tokens) == ("gpu", 2048)
    assert (here.platform, here.rows[0].block_size) == ("cpu", 128)


def test_longest_request_where_the_full_length_does_not_fit(planner: Planner) -> None:
    """vLLM keeps one block for itself; all the others may be one request's."""
    memory = 301 * 16 * QWEN.token_bytes("auto") + 5
    found = by_dtype(planner(QWEN.folder, 80 * GIB, memory))
    row = found["auto"]
    assert (row.tokens, row.requests, row.longest) == (None, None, 300 * 16)
    assert found["fp8"].longest == 601 * 16
    again = by_dtype(planner(QWEN.folder, 80 * GIB, memory, max_model_len=row.longest))["auto"]
    assert again.tokens == 301 * 16


def test_quantised_weights_without_kernels_here(
    planner: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The cache is as without quantisation; weights are the files' share, and asked for where there are no files."""
    import torch

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    config = json.loads((MODELS / LLAMA.name / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"tensor_parallel_size": 2}
    quantised = planner(str(tmp_path), 80 * GIB, 8 * GIB, **options)
    assert quantised.rows == planner(LLAMA.folder, 80 * GIB, 8 * GIB, **options).rows
    with pytest.raises(ValueError, match="give --kv-cache-memory"):
        planner(str(tmp_path), 80 * GIB, **options)
    total = random.Random(seed).randrange(8 * GIB, 9 * GIB)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": {}}))
    budget = planner(str(tmp_path), 80 * GIB, **options).budget
    assert (budget.weights, budget.weights_from, budget.checkpoint) == (total // 2, "checkpoint", total)
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}  # auto would mean fp8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ScaledMM"):
        planner(str(tmp_path), 80 * GIB, 8 * GIB, **options)


@pytest.mark.parametrize("model", ["mla", "encoder-decoder", "alibi-always", "head-24", "attention-free"])
def test_refused_as_at_start(model: str, planner: Planner, models: dict[str, str], engine_config: Callable[..., Any]) -> None:
    from vllm_turboquant.config import TurboQuantError

    with pytest.raises(TurboQuantError) as served:
        engine_config(model)
    for gpu_memory in (None, 80 * GIB):
        with pytest.raises(TurboQuantError) as planned:
            planner(models[model], gpu_memory, GIB)
        assert str(planned.value) == str(served.value)


def test_refused_on_a_gpu_only(planner: Planner, models: dict[str, str], tmp_path: Path) -> None:
    from vllm_turboquant.config import TurboQuantError

    config = json.loads((Path(models["llama"]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 528}))
    assert by_dtype(planner(str(tmp_path), None, GIB))["turboquant"].tokens > 0
    with pytest.raises(TurboQuantError, match="head size 528; allowed on a GPU"):
        planner(str(tmp_path), 80 * GIB)


@pytest.mark.parametrize("head_size", (256, 512))
def test_large_heads_are_planned_with_a_word(head_size: int, planner: Planner, models: dict[str, str], tmp_path: Path) -> None:
    """What the GPU is, the plan is not told."""
    from vllm_turboquant.tables import plan_text

    config = json.loads((Path(models["llama"]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": head_size}))
    text = plan_text(planner(str(tmp_path), 80 * GIB))
    assert text.endswith("\nHeads of 512 dims are served on Hopper GPUs alone.") is (head_size == 512)


def test_memory_must_be_known_and_enough(planner: Planner) -> None:
    with pytest.raises(ValueError, match="give --gpu-memory or --kv-cache-memory"):
        planner(LLAMA.folder)
    with pytest.raises(ValueError, match=r"nothing is left for the KV cache: 16\.00 GiB x 0\.92 hold 14\.99 GiB of weights"):
        planner(LLAMA.folder, 16 * GIB)


def test_hybrid_models_are_planned(planner: Planner, models: dict[str, str]) -> None:
    """Two attention layers share pages with six recurrent ones: four groups of two, of which three take two pages a request
    each where prefixes are cached, which is the default."""
    memory = 8 * GIB
    found = by_dtype(planner(models["hybrid"], 80 * GIB, memory))
    for dtype in PRESETS:
        size = found[dtype].block_size
        blocks = memory // (2 * size * 4 * slot_bytes(dtype, 256))
        assert found[dtype].requests == pytest.approx(blocks / (ceil(8192 / size) + 3 * 2), rel=1e-12), dtype
        # Less than one of several hundred blocks is left over.
        assert found[dtype].bytes_per_token == pytest.approx(memory / found[dtype].tokens, rel=1e-2), dtype
