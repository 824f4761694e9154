"""Calibration of a whole engine: the first start fits the keys and keeps them, the second loads them, answers are better."""

from __future__ import annotations

import random
import re
import statistics
from pathlib import Path

from .answers import assert_same, story
from .test_engines import LLM, answers, deviations, run_jobs


def test_calibrated_engine(smollm2: Path, tmp_path: Path) -> None:
    """By three-bit codes, which show the difference."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(story(random.Random(0), 200))["input_ids"]]  # a fixed text: what is gained on it was measured
    # Keys have two means by position, the prompt crosses from one to the other in the midst of a chunk.
    llm = LLM | {"model": str(smollm2), "max_num_batched_tokens": 384, "max_model_len": 1024}
    # Layers that stay uncompressed stand between the calibrated ones.
    skipped = [str(layer) for layer in range(0, 30, 3)]
    off = llm | {"kv_cache_dtype": "turboquant-k3v3", "kv_cache_dtype_skip_layers": skipped}
    calibrated = off | {"additional_config": {}}
    engines = {"auto": llm, "off": off, "first": calibrated, "second": calibrated}
    jobs = [{"name": name, "prompts": prompts, "max_tokens": 2, "llm": engine} for name, engine in engines.items()]
    results = run_jobs(jobs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))

    starts = (tmp_path / "engines.log").read_text(errors="replace").split("JOB ")
    lines = [re.findall(r"TurboQuant: ([^;\n]*alibrat[^;\n]*|key bias .*)", start) for start in starts]
    (kept,) = (tmp_path / "cache" / "turboquant" / "calibration").iterdir()
    assert lines[0] == lines[1] == []
    assert lines[2][0] == "calibrating keys of 20 layers, once per model ..."
    assert re.fullmatch(rf"calibrated in \d+\.\d s, kept in {re.escape(str(kept))}\.", lines[2][1])
    assert lines[3] == [f"calibration of 20 layers loaded from {kept}."]

    assert_same(answers(results, "first"), answers(results, "second"))
    moved = {name: statistics.mean(deviations(results, name, "auto")) for name in ("off", "first", "second")}
    print({name: round(value, 4) for name, value in moved.items()})
    assert moved["first"] == moved["second"]
    assert 0 < moved["first"] < 0.9 * moved["off"]
