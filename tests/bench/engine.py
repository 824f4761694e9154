"""vLLM's engine on a Llama-3.1-8B shape with dummy weights: capacity, prefill seconds, time per output token, start-up.

    python -m tests.bench.engine auto fp8 turboquant          one process a dtype, one `call` for all rows
    python -m tests.bench.engine --full auto turboquant       also with as many 8192-token requests as fit, a minute a dtype
    python -m tests.bench.engine --memory auto turboquant     peak memory beside the KV cache against context
    python -m tests.bench.engine --start auto auto turboquant turboquant     start-up alone, cold and warm

Appends a row a dtype to results/engine_<card>.jsonl, memory_<card>.jsonl or start_<card>.jsonl. ``turboquant`` is as installed:
calibrated, on random token ids for want of a tokenizer; ``turboquant:off`` is data-free. Prefill and decode of B requests of L
tokens are told apart by running 1 and 65 output tokens, medians of some runs each. A dtype named twice is started twice: the
second finds warm caches.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from vllm_turboquant.config import is_ours

from .rows import append_row

SHAPES = ((48, 8192, 1), (1, 32768, 5))  # requests, tokens of a prompt, runs
OUTPUT_TOKENS = 65
MAX_REQUESTS = 256
MODES = ("--memory", "--start")
CONTEXTS = (8192, 131000)  # tokens of the one request whose memory is watched


def start(dtype: str, max_model_len: int) -> tuple[Any, float]:
    """A Llama-3.1-8B with dummy weights in this process, decodes in FULL graphs; and the seconds its start took."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    dtype, _, calibration = dtype.partition(":")
    begin = time.time()
    llm = LLM(
        model=str(Path(__file__).parent / "models" / "llama8b"),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=max_model_len,
        gpu_memory_utilization=0.88,
        kv_cache_dtype=dtype,
        additional_config={"turboquant": {"calibration": calibration}} if calibration else {},
        enable_prefix_caching=False,
        max_num_seqs=MAX_REQUESTS,
        max_num_batched_tokens=8192,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 8, 16, 32, 48, 64, 128, 256],
        },
    )
    return llm, time.time() - begin


def generate(llm: Any, batch: int, length: int, tokens: int) -> float:
    """Seconds for ``batch`` random prompts of ``length`` tokens and ``tokens`` more each."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [random.randint(5, 100000) for _ in range(length)]} for _ in range(batch)]
    sampling = SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
    begin = time.time()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.time() - begin


def named(dtype: str) -> dict[str, object]:
    name, _, calibration = dtype.partition(":")
    return {"dtype": name, "calibration": calibration or ("auto" if is_ours(name) else None)}


def measure(dtype: str, full: bool) -> dict[str, object]:
    """In this process: starts an engine and times it; ``full``: also when its cache is."""
    llm, start_s = start(dtype, 40960)
    cache = llm.llm_engine.vllm_config.cache_config

    generate(llm, 2, 256, 4)
    row: dict[str, object] = {
        **named(dtype),
        "capacity_tokens": cache.num_gpu_blocks * cache.block_size,
        "start_s": round(start_s, 1),
    }
    for batch, length, runs in SHAPES:
        prefill, whole = (
            statistics.median(generate(llm, batch, length, tokens) for _ in range(runs)) for tokens in (1, OUTPUT_TOKENS)
        )
        tpot_ms = (whole - prefill) / (OUTPUT_TOKENS - 1) * 1e3
        row[f"B{batch}_L{length}"] = {"prefill_s": round(prefill, 2), "tpot_ms": round(tpot_ms, 2)}
    if full:
        length = SHAPES[0][1]
        requests = min(MAX_REQUESTS, cache.num_gpu_blocks // -(-(length + OUTPUT_TOKENS) // cache.block_size))
        prefill, whole = generate(llm, requests, length, 1), generate(llm, requests, length, OUTPUT_TOKENS)
        row["full"] = {"requests": requests, "tokens_per_s": round(requests * (OUTPUT_TOKENS - 1) / (whole - prefill), 1)}
    return row


def measure_memory(dtype: str) -> dict[str, object]:
    """In this process: bytes beyond those of the idle engine, its KV cache included, while one request of each length runs."""
    import torch

    llm, _ = start(dtype, CONTEXTS[-1] + 64)
    generate(llm, 2, 256, 4)
    row = named(dtype)
    for length in CONTEXTS:
        idle = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        generate(llm, 1, length, 16)
        row[f"L{length}_mib"] = round((torch.cuda.max_memory_allocated() - idle) / 2**20, 1)
    return row


def main() -> None:
    modes = [argument for argument in sys.argv[1:] if argument in ("--full", *MODES)]
    arguments = [argument for argument in sys.argv[1:] if argument not in modes]
    results = next((mode.removeprefix("--") for mode in modes if mode in MODES), "engine")
    if arguments[0] == "--one":
        if results == "start":
            row = named(arguments[1]) | {"start_s": round(start(arguments[1], 40960)[1], 1)}
        else:
            row = measure_memory(arguments[1]) if results == "memory" else measure(arguments[1], "--full" in modes)
        print("ROW", json.dumps(row), flush=True)
        return
    call = uuid.uuid4().hex[:8]
    for dtype in arguments:
        command = [sys.executable, "-m", "tests.bench.engine", *modes, "--one", dtype]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        rows = [line[4:] for line in child.stdout.splitlines() if line.startswith("ROW ")]
        if not rows:
            print(f"{dtype}: no result, exit {child.returncode}\n{child.stdout[-3000:]}", flush=True)
            continue
        print(append_row(results, {**json.loads(rows[0]), "call": call}), flush=True)


if __name__ == "__main__":
    main()
