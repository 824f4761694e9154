"""The engines of ``test_features``: each with dtype ``auto``, with raw numbers in our pages, and with codes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from . import images
from .harness import LOSSLESS
from .shapes import VOCABULARY
from .test_engines import Results, run_jobs
from .test_kinds import K4V4, LLM, prompt, write
from .weights import adapter, real_weights

REGEX = "[0-9]{3}-[a-f]{5}"
BOTH = (LOSSLESS, K4V4)
NGRAM = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
UNCALIBRATED = {"additional_config": {"turboquant": {"calibration": "off"}}}
TARGET = "target"
# Method to target and drafter; None: it is part of the target, or there is none.
DRAFTERS: dict[str, tuple[str, str | None]] = {
    "ngram": (TARGET, None),
    "draft model": (TARGET, "drafter"),
    "eagle": (TARGET, "eagle"),
    "eagle3": (TARGET, "eagle 3"),
    "mtp": ("glm 4 moe", None),
    "mtp of gemma 4": ("gemma 4", "gemma 4 assistant"),
}
SPECULATION: dict[str, tuple[str, str | None, int]] = {
    f"{method}, {drafts}": (*DRAFTERS[method], drafts)
    for method in DRAFTERS
    for drafts in ((1, 3, 7) if method in ("ngram", "draft model") else (3,))
}
QUANTISED = ("awq", "gptq", "fp8")
CODED = 3  # drafts with which codes run as well
# Short blocks and steps, and more requests than run at once.
CROWDED = {"max_num_seqs": 3, "block_size": 32, "max_num_batched_tokens": 64}
SEEING = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0}
SKIPPED = {
    "sliding_window": {0, 2},
    "1 3": {1, 3},
    "0": {0},
    "2": {2},
}


class Jobs:
    """Engines to run, by name. base: what they have in common, beside model and dtype."""

    def __init__(self, root: Path, seed: int, base: dict[str, Any] = LLM) -> None:
        self.root, self.rng, self.base, self.jobs = root, random.Random(seed), base, {}
        self.prompts = [prompt(self.rng, length) for length in (7, 60, 150, 33)]
        motif = prompt(self.rng, 9)
        self.prompts.append(motif * 9)  # which n-grams predict

    def add(self, name: str, kind: str, kv: str, job: dict[str, Any] | None = None, **llm: Any) -> None:
        small = VOCABULARY if kind not in (TARGET, "glm 4 moe") else 16
        prompts = [[token % (small - 3) + 3 for token in one] for one in self.prompts]
        engine = self.base | {"model": write(kind, self.root), "kv_cache_dtype": kv} | llm
        self.jobs[name] = {"name": name, "prompts": prompts, "max_tokens": 24, "llm": engine} | (job or {})

    def run(self, **environment: str) -> Results:
        return run_jobs(list(self.jobs.values()), self.root, **environment)


def example_connector(folder: Path) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` of pages in a folder."""
    storage = {"shared_storage_path": str(folder)}
    return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": storage}


def speculative(method: str, drafter: str | None, drafts: int, root: Path) -> dict[str, Any]:
    """vLLM's ``speculative_config``; method: vLLM's word, maybe " of " a model. drafter: the kind of its model, if it has one of
    its own."""
    method = method.partition(" of ")[0].replace(" ", "_")
    own = {"model": write(drafter, root)} if drafter else NGRAM if method == "ngram" else {}
    return {"method": method, "num_speculative_tokens": drafts} | own


def run(root: Path, seed: int, smollm2: Path) -> Results:
    """All of them in one process, whose log is in ``root``. smollm2: a folder with a tokenizer."""
    jobs = Jobs(root, seed)
    for kind in ("llama", TARGET, "glm 4 moe", "gemma 3", "gemma 4"):
        jobs.add(f"{kind}/auto", kind, "auto")
    for case, (kind, drafter, drafts) in SPECULATION.items():
        method = speculative(case.rpartition(",")[0], drafter, drafts, root)
        for dtype in BOTH if drafts == CODED else (LOSSLESS,):
            jobs.add(f"{case}/{dtype}", kind, dtype, speculative_config=method, disable_log_stats=False, **CROWDED)
    for dtype in ("auto", *BOTH):
        for kind in QUANTISED:  # vLLM's fp8 kernel without AMX is slow
            jobs.add(f"{kind}/{dtype}", kind, dtype, {"max_tokens": 4}, dtype="bfloat16")
        again = {"given": False, "max_tokens": 8, "then": ["ask again", "reset the prefix cache"]}
        for kind in ("llama", "gemma 3"):  # full attention, windows
            jobs.add(f"prefixes of {kind}/{dtype}", kind, dtype, again, disable_log_stats=False)
        short = {"given": False, "max_tokens": 8}
        for fast in (False, True):  # keys stored by position, which such batches do not tell
            jobs.add(f"shared, {fast}/{dtype}", "gemma 3n", dtype, short, kv_sharing_fast_prefill=fast, max_model_len=1024)
        jobs.add(f"preemption/{dtype}", "llama", dtype, disable_log_stats=False, num_gpu_blocks_override=9, block_size=32)
        grammar = {"tokenizer": str(smollm2), "skip_tokenizer_init": False}
        jobs.add(f"embedding/{dtype}", "words", dtype, {"embed": True}, runner="pooling", convert="embed", **grammar)
        jobs.add(f"grammar/{dtype}", "words", dtype, {"regex": REGEX}, **grammar)
        jobs.add(
            f"adapter/{dtype}", "llama", dtype, {"lora": str(root / "adapter"), "given": False}, enable_lora=True, max_lora_rank=8
        )
    adapter(root)
    real = {"model": real_weights(root, VOCABULARY), "load_format": "auto"}
    for dtype in BOTH:
        jobs.add(f"reload/{dtype}", "llama", dtype, {"then": ["reload the weights"]}, **real)
        jobs.add(f"own cache/{dtype}", "own cache", dtype)
        for skip in SKIPPED:
            jobs.add(f"skip {skip}/{dtype}", "gemma 3", dtype, kv_cache_dtype_skip_layers=skip.split())
        connector = example_connector(root / f"storage-{dtype}")
        # vLLM's example stores whole prompts only.
        whole = {"max_num_batched_tokens": 512, "kv_transfer_config": connector, "disable_log_stats": False} | UNCALIBRATED
        jobs.add(f"storage/{dtype}", "llama", dtype, {"given": False, "then": ["reset the prefix cache"]}, **whole)
        jobs.add(f"storage again/{dtype}", "llama", dtype, {"given": False}, **whole)
    (root / "prefix").mkdir()
    folder, _ = images.write(root / "prefix", smollm2, is_mm_prefix_lm=True)
    text = SEEING | {"limit_mm_per_prompt": {}, "language_model_only": True}
    for dtype in ("auto", *BOTH):
        jobs.add(f"text alone/{dtype}", "llama", dtype, {"max_tokens": 8}, model=folder, **text)
    folder, image = images.write(root, smollm2)
    before, after = prompt(jobs.rng, 9), prompt(jobs.rng, 70)
    asked = [[*before, image, *after]] * 2 + [prompt(jobs.rng, 60)]
    for dtype in ("auto", *BOTH):
        jobs.add(f"images/{dtype}", "llama", dtype, {"prompts": asked, "images": [1, 2, None]}, model=folder, **SEEING)
    long = {"prompts": [prompt(jobs.rng, 1000), prompt(jobs.rng, 2100)], "max_tokens": 2, "given": False, "then": ["ask again"]}
    states = {"block_size": None, "dtype": "bfloat16", "max_model_len": 4096, "max_num_batched_tokens": 1024}
    states |= {"kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": True, "disable_log_stats": False}
    jobs.add("states/turboquant", "qwen 3 next", K4V4, long, **states)
    jobs.add("finer states/turboquant", "qwen 3 next", K4V4, long, **states, prefix_match_unit=16)
    jobs.add("plain/turboquant", "llama", K4V4, {"given": False}, max_num_batched_tokens=512, **UNCALIBRATED)
    return jobs.run(VLLM_CACHE_ROOT=str(root / "cache"))
