"""Kinds of models, tiny and with random weights: raw numbers in our pages answer as vLLM's own cache does, codes nearly so.

All engines run in one process, started by the first test that asks.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from .answers import LOGPROB_TOLERANCE, assert_same
from .harness import LOSSLESS
from .shapes import SHAPES, VOCABULARY
from .test_engines import Results, answers, deviations, run_jobs

K4V4 = "turboquant"
DTYPES = ("auto", LOSSLESS, K4V4)
LLM = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "block_size": 32,
    "kv_cache_memory_bytes": 16 << 20,
    "gpu_memory_utilization": 0.1,
}
# vLLM chooses blocks that fit the states beside them.
STATES = {"block_size": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "nemotron h": STATES,
    "qwen 3 next": STATES | {"dtype": "bfloat16"},  # vLLM's kernel of the recurrent layers has no other on a CPU
}
# bfloat16 keeps 8 bits: attention that is rounded at other places moved a log-probability by 0.02, codes of 4 bits by 0.3.
BF16_TOLERANCE = 0.1
# On a CPU vLLM has no kernel for the state layers of Mamba 1.
KINDS = tuple(kind for kind in SHAPES if kind != "jamba")
SHARED = {"gemma 4": {4: 3, 5: 2}, "gemma 3n": {2: 0, 3: 1}}


def write(kind: str, root: Path) -> str:
    """A folder with the configuration of a kind."""
    folder = root / kind.replace(" ", "-").replace(",", "")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[kind]))
    return str(folder)


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(length)]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Shorter and longer than the windows of 48 tokens and the chunks of 64."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"prompts by seed {seed}")
    rng = random.Random(seed)
    return [prompt(rng, length) for length in (7, 60, 150)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def results(log: Path, prompts: list[list[int]]) -> Results:
    jobs = []
    for kind in KINDS:
        llm = LLM | OPTIONS.get(kind, {}) | {"model": write(kind, log)}
        jobs += [
            {"name": f"{kind}/{kv}", "prompts": prompts, "max_tokens": 24, "llm": llm | {"kv_cache_dtype": kv}} for kv in DTYPES
        ]
    return run_jobs(jobs, log, VLLM_CACHE_ROOT=str(log / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_answers(kind: str, results: Results) -> None:
    """Every layer in our pages; the same answers from raw numbers, other ones from codes: the comparison can fail."""
    auto, lossless, k4v4 = (f"{kind}/{kv}" for kv in DTYPES)
    assert set(results[lossless]["layers"].values()) == {LOSSLESS}
    assert set(results[k4v4]["layers"].values()) == {K4V4}
    moved = deviations(results, lossless, auto)
    coded = statistics.mean(deviations(results, k4v4, auto))
    print(f"{kind}: prompt log-probabilities move by at most {max(moved):.2g}, by {coded:.2g} on average from codes")
    if OPTIONS.get(kind, {}).get("dtype") == "bfloat16":
        assert max(moved) < BF16_TOLERANCE
        assert statistics.mean(moved) < coded / 3
    else:
        assert max(moved) < LOGPROB_TOLERANCE
        assert_same(answers(results, auto), answers(results, lossless))
    assert coded > 50 * LOGPROB_TOLERANCE
