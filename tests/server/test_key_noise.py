"""A layer whose key bias neither codes can carry nor softmax hides: full precision for it, beside compressed ones."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from .answers import LOGPROB_TOLERANCE
from .features import UNCALIBRATED
from .test_engines import Results, deviations, run_jobs
from .test_kinds import K4V4, LLM, fresh_prompts, lines, write

QUIET, LOUD = "gpt-oss", "gpt-oss, loud key biases"
SKIPPED = {"kv_cache_dtype_skip_layers": ["1"]}  # the loud one


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("noise")


@pytest.fixture(scope="module")
def results(root: Path) -> Results:
    asked = {"prompts": fresh_prompts(), "max_tokens": 4}
    jobs = []
    for kind in (QUIET, LOUD):
        for name, options in {"auto": {}, K4V4: UNCALIBRATED, "skipped": UNCALIBRATED | SKIPPED}.items():
            llm = LLM | {"model": write(kind, root), "kv_cache_dtype": "auto" if name == "auto" else K4V4}
            jobs.append({"name": f"{kind}/{name}", "llm": llm | options} | asked)
    return run_jobs(jobs, root, VLLM_CACHE_ROOT=str(root / "cache"))


def test_the_loud_layer_alone_is_left_out(results: Results, root: Path) -> None:
    assert None not in results[f"{QUIET}/{K4V4}"]["layers"].values()
    found = results[f"{LOUD}/{K4V4}"]["layers"]
    (name,) = (name for name, preset in found.items() if preset is None)
    assert ".1." in name
    said = lines(root)[f"{LOUD}/{K4V4}"]
    (why,) = (line for line in said if line.startswith("left out are layers"))
    assert re.search(rf"{re.escape(name)} \([\d.]+ nats\); [\d,]+ bytes more per token", why), why
    (line,) = (line for line in said if line.startswith(f"{K4V4}; "))
    assert "3 attention layers compressed" in line
    assert f"1 not, as 4 bits cannot carry their key bias ({name})" in line


def test_it_answers_as_if_the_layer_had_been_skipped_by_hand(results: Results) -> None:
    alone, by_hand = (deviations(results, f"{LOUD}/{name}", f"{LOUD}/auto") for name in (K4V4, "skipped"))
    quiet = statistics.mean(deviations(results, f"{QUIET}/{K4V4}", f"{QUIET}/auto"))
    print(f"log-probabilities move by {statistics.mean(alone):.3g}, of the quiet model by {quiet:.3g}")
    assert alone == by_hand
    assert LOGPROB_TOLERANCE < statistics.mean(alone) < 2 * quiet
