"""vLLM's engine on a Llama-3.1-8B shape with dummy weights: capacity, prefill seconds, time per output token, start-up.

    python -m tests.bench.engine auto fp8 turboquant          one process a dtype, one `call` for all rows
    python -m tests.bench.engine --full auto turboquant       also with as many 8192-token requests as fit, a minute a dtype
    python -m tests.bench.engine --memory auto turboquant     peak memory beside the KV cache against context
    python -m tests.bench.engine --start auto auto turboquant turboquant     start-up alone, cold and warm

Appends a row a dtype to results/engine_<card>.jsonl, memory_<card>.jsonl or start_<card>.jsonl. ``turboquant`` is as installed:
calibrated, on random token ids for want of a tokenizer; ``turboquant:off`` is data-free. ``prefill_s`` is the median time of
runs of B requests of L tokens and one output token. ``tpot_ms`` is the median time of engine steps once all B requests have
their first token, so that steps decode them all and do nothing else; ``with_prefill_s`` the time until then. A dtype named
twice is started twice: the second finds warm caches.
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
STEPS = 64  # that are timed
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


def steps(llm: Any, batch: int, length: int) -> tuple[float, float]:
    """Seconds until all of ``batch`` random prompts have a token, and the median time of `STEPS` steps after that."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(max_tokens=most_tokens(batch), ignore_eos=True, temperature=0, detokenize=False)
    begin, waiting = time.perf_counter(), set()
    for i in range(batch):
        prompt = {"prompt_token_ids": [random.randint(5, 100000) for _ in range(length)]}
        engine.add_request(f"{i} of {batch}", prompt, sampling)
        waiting.add(f"{i} of {batch}")
    running = list(waiting)
    while waiting:
        waiting -= {out.request_id for out in engine.step() if out.outputs[0].token_ids}
    until_then = time.perf_counter() - begin
    times, last = [], None
    while len(times) < STEPS:
        outputs = engine.step()
        assert not outputs or len(outputs) == batch, f"{len(outputs)} of {batch} requests had a token: some do not fit the pool"
        if outputs:
            now = time.perf_counter()
            times += [] if last is None else [now - last]
            last = now
    engine.abort_request(running)
    while engine.has_unfinished_requests():
        engine.step()
    return until_then, statistics.median(times)


def most_tokens(batch: int) -> int:
    """Output tokens of the first request, which has one a prompt while the others' are read, and of the timed steps."""
    return 2 * batch + STEPS + 8


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
        prefill = statistics.median(generate(llm, batch, length, 1) for _ in range(runs))
        with_prefill, step = steps(llm, batch, length)
        times = {"prefill_s": prefill, "with_prefill_s": with_prefill, "tpot_ms": step * 1e3}
        row[f"B{batch}_L{length}"] = {name: round(value, 2) for name, value in times.items()}
    if full:
        length = SHAPES[0][1]
        blocks = [-(-(length + most_tokens(n)) // cache.block_size) for n in range(MAX_REQUESTS + 1)]
        requests = max(n for n in range(1, MAX_REQUESTS + 1) if n * blocks[n] <= cache.num_gpu_blocks)
        with_prefill, step = steps(llm, requests, length)
        row["full"] = {
            "requests": requests,
            "with_prefill_s": round(with_prefill, 2),
            "tpot_ms": round(step * 1e3, 2),
            "tokens_per_s": round(requests / step, 1),
        }
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
