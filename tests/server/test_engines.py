"""Every preset and unusual model shapes, through `vllm.LLM`: a start-up here takes seconds, a server half a minute."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_turboquant.kernels.format import PRESETS

from .answers import Answer, assert_same, story
from .harness import ENVIRONMENT, LOSSLESS, RECENT, end_with_parent

TIMEOUT = 600  # seconds for all jobs of one run; 60 to 90 on two idle cores
LLM = {
    "additional_config": {"turboquant": {"calibration": "off"}},  # test_calibration.py has the default
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 128,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "gpu_memory_utilization": 0.1,
}
# Mean change of a prompt token's log-probability by each preset. Bounds are twice what SmolLM2 measured on these texts:
# room for other rounding and for other encoders, not for a codec one bit poorer on both sides.
DEVIATION = {
    "turboquant": 2 * 0.121,
    "turboquant-k8v4": 2 * 0.053,
    "turboquant-k4v3": 2 * 0.141,
    "turboquant-k3v3": 2 * 0.289,
    "turboquant-k2v2": 2 * 0.812,
    "turboquant-k4v4-qjl": 2 * 0.365,
}

Results = dict[str, dict[str, Any]]


def run_jobs(jobs: list[dict[str, Any]], folder: Path, **environment: str) -> Results:
    """Writes ``engines.log`` into ``folder``; ``environment``: variables for the engines beside those of all tests."""
    todo, done, log = folder / "jobs.json", folder / "results.json", folder / "engines.log"
    todo.write_text(json.dumps(jobs))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.engine", str(todo), str(done)],
            cwd=Path(__file__).parents[2],
            env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )
        try:
            status = process.wait(timeout=TIMEOUT)
        finally:
            process.kill()  # the engines run in this one process
            process.wait()
    text = log.read_text(errors="replace")
    print("\n".join(line for line in text.splitlines() if line.startswith("JOB")))
    # Each engine puts its rank before every line of a traceback once more.
    told = [line.replace("[rank0]: ", "") for line in text.splitlines() if "leaked" not in line]
    assert status == 0, "\n".join(told[-40:])
    return json.loads(done.read_text())


def answers(results: Results, name: str) -> list[Answer]:
    return [Answer("", [str(t) for t in a["tokens"]], a["logprobs"], a["gaps"]) for a in results[name]["answers"]]


def deviations(results: Results, name: str, reference: str) -> list[float]:
    pairs = zip(results[name]["answers"], results[reference]["answers"], strict=True)
    return [abs(x - y) for a, b in pairs for x, y in zip(a["prompt_logprobs"], b["prompt_logprobs"], strict=True)]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def presets(smollm2: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    # Fixed texts: the deviations below are compared with what these texts measured.
    texts = ["The capital of France is", *(story(random.Random(i), 40) for i in range(2))]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    jobs = [
        {"name": kv, "prompts": prompts, "max_tokens": 2, "llm": LLM | {"model": str(smollm2), "kv_cache_dtype": kv}}
        for kv in ("auto", *PRESETS)
    ]
    skipping = {"kv_cache_dtype_skip_layers": [str(layer) for layer in range(15)]}
    jobs.append(jobs[1] | {"name": "skip", "llm": jobs[1]["llm"] | skipping})
    return run_jobs(jobs, tmp_path_factory.mktemp("presets"))


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_really_compressed_and_answers(presets: Results, tokenizer: Any, preset: str) -> None:
    moved = statistics.mean(deviations(presets, preset, "auto"))
    answer = tokenizer.decode(presets[preset]["answers"][0]["tokens"])
    print(f"{preset}: log-probabilities move by {moved:.3f} on average; answer {answer!r}")
    assert 0.001 < moved <= DEVIATION[preset]
    if preset != "turboquant-k2v2":  # two bits without calibration are not meant for use
        assert answer == " Paris."


def test_skipped_layers_are_not_compressed(presets: Results) -> None:
    half, whole = (statistics.mean(deviations(presets, name, "auto")) for name in ("skip", "turboquant"))
    print(f"log-probabilities move by {half:.4f} with half of the layers compressed, by {whole:.4f} with all")
    assert 0 < half < whole


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_sliding_windows_and_mixed_head_sizes(
    tiny_models: dict[str, Path], kind: str, tmp_path: Path, rng: random.Random
) -> None:
    """Prompts longer and shorter than the window of 48 tokens, in chunks of 128; answers longer than the recent window."""
    prompts = [[rng.randrange(100, 40000) for _ in range(length)] for length in (7, 60, 300)]
    jobs = [
        {
            "name": kv,
            "prompts": prompts,
            "max_tokens": 80,
            "llm": LLM | {"model": str(tiny_models[kind]), "kv_cache_dtype": kv},
        }
        for kv in ("auto", LOSSLESS, RECENT, "turboquant")
    ]
    results = run_jobs(jobs, tmp_path)
    for exact in (LOSSLESS, RECENT):
        assert_same(answers(results, "auto"), answers(results, exact))
        assert max(deviations(results, exact, "auto")) < 1e-3
    # The comparison can fail: four bits move the same values far beyond rounding.
    assert statistics.mean(deviations(results, "turboquant", "auto")) > 1e-2
