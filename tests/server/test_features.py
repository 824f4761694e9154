"""What vLLM does around a model: speculation, reused and preempted blocks, adapters, grammars, connectors, ranks.

Raw numbers in our pages answer as a plain engine of dtype ``auto`` does; codes run. All engines in one process.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from . import images
from .answers import assert_same
from .harness import LOSSLESS
from .shapes import VOCABULARY
from .test_engines import Results, answers, deviations, run_jobs
from .test_kinds import BF16_TOLERANCE, K4V4, LLM, TOLERANCE, lines, prompt, write
from .weights import adapter, real_weights

REGEX = "[0-9]{3}-[a-f]{5}"
BOTH = (LOSSLESS, K4V4)
NGRAM = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
UNCALIBRATED = {"additional_config": {"turboquant": {"calibration": "off"}}}
TARGET = "target"
SPECULATION: dict[str, tuple[str, str | None, int]] = {
    **{f"ngram, {drafts}": (TARGET, None, drafts) for drafts in (1, 3, 7)},
    **{f"draft model, {drafts}": (TARGET, "drafter", drafts) for drafts in (1, 3, 7)},
    "eagle, 3": (TARGET, "eagle", 3),
    "eagle3, 3": (TARGET, "eagle 3", 3),
    "mtp, 3": ("glm 4 moe", None, 3),
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
    """Engines to run, by name."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng, self.jobs = root, random.Random(seed), {}
        self.prompts = [prompt(self.rng, length) for length in (7, 60, 150, 33)]
        motif = prompt(self.rng, 9)
        self.prompts.append(motif * 9)  # which n-grams predict

    def add(self, name: str, kind: str, kv: str, job: dict[str, Any] | None = None, **llm: Any) -> None:
        small = VOCABULARY if kind not in (TARGET, "glm 4 moe") else 16
        prompts = [[token % (small - 3) + 3 for token in one] for one in self.prompts]
        engine = LLM | {"model": write(kind, self.root), "kv_cache_dtype": kv} | llm
        self.jobs[name] = {"name": name, "prompts": prompts, "max_tokens": 24, "llm": engine} | (job or {})

    def run(self) -> Results:
        return run_jobs(list(self.jobs.values()), self.root, VLLM_CACHE_ROOT=str(self.root / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def results(root: Path, smollm2: Path) -> Results:
    seed = random.SystemRandom().randrange(2**31)
    print(f"prompts by seed {seed}")
    jobs = Jobs(root, seed)
    for kind in ("llama", TARGET, "glm 4 moe", "gemma 3"):
        jobs.add(f"{kind}/auto", kind, "auto")
    for case, (kind, drafter, drafts) in SPECULATION.items():
        method = {"method": case.rpartition(",")[0].replace(" ", "_"), "num_speculative_tokens": drafts}
        method |= {"model": write(drafter, root)} if drafter else NGRAM if case.startswith("ngram") else {}
        for dtype in BOTH if drafts == CODED else (LOSSLESS,):
            jobs.add(f"{case}/{dtype}", kind, dtype, speculative_config=method, disable_log_stats=False, **CROWDED)
    for dtype in ("auto", *BOTH):
        for kind in QUANTISED:  # vLLM's fp8 kernel without AMX is slow
            jobs.add(f"{kind}/{dtype}", kind, dtype, {"max_tokens": 4}, dtype="bfloat16")
        again = {"given": False, "max_tokens": 8, "then": ["ask again", "reset the prefix cache"]}
        for kind in ("llama", "gemma 3"):  # full attention, windows
            jobs.add(f"prefixes of {kind}/{dtype}", kind, dtype, again, disable_log_stats=False)
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
        storage = {"shared_storage_path": str(root / f"storage-{dtype}")}
        connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": storage}
        # vLLM's example stores whole prompts only.
        whole = {"max_num_batched_tokens": 512, "kv_transfer_config": connector, "disable_log_stats": False} | UNCALIBRATED
        jobs.add(f"storage/{dtype}", "llama", dtype, {"given": False, "then": ["reset the prefix cache"]}, **whole)
        jobs.add(f"storage again/{dtype}", "llama", dtype, {"given": False}, **whole)
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
    return jobs.run()


def again(results: Results, name: str, index: int) -> Results:
    """The answers of the ``index``-th repetition, as a job of their own."""
    return {"again": {"answers": results[name]["then"][index]}}


@pytest.mark.parametrize("case", SPECULATION)
def test_speculation(case: str, results: Results) -> None:
    """Drafts are verified, most are rejected; requests wait for others to end and join those that run."""
    kind = SPECULATION[case][0]
    plain = f"{kind}/auto"
    lossless = results[f"{case}/{LOSSLESS}"]
    drafted, accepted = (lossless["metrics"][f"spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    print(f"{case}: {accepted} of {drafted} drafts accepted")
    assert drafted > accepted
    if not case.startswith("mtp"):  # which is never right with random weights
        assert accepted > 0
    assert max(deviations(results, f"{case}/{LOSSLESS}", plain)) < TOLERANCE
    assert_same(answers(results, plain), answers(results, f"{case}/{LOSSLESS}"))
    for dtype in BOTH if SPECULATION[case][2] == CODED else (LOSSLESS,):
        found = results[f"{case}/{dtype}"]
        assert set(found["layers"].values()) == {dtype}
        # The drafter's layer too.
        assert len(found["layers"]) == len(results[plain]["layers"]) + (not case.startswith("ngram"))
        assert found["metrics"]["spec_decode_num_draft_tokens"] > 0


@pytest.mark.parametrize("kind", ["llama", "gemma 3"])
def test_prefixes(kind: str, results: Results) -> None:
    """Chunks of 64 tokens; asked again from reused blocks, and once more after these were given up."""
    for dtype in ("auto", *BOTH):
        name = f"prefixes of {kind}/{dtype}"
        first = answers(results, name)
        assert results[name]["metrics"]["prefix_cache_hits"] >= 128
        for index in (0, 1):
            assert_same(first, answers(again(results, name, index), "again"))
    assert_same(*(answers(results, f"prefixes of {kind}/{dtype}") for dtype in ("auto", LOSSLESS)))


def test_embeddings(results: Results) -> None:
    """Of a decoder's last token. Raw numbers give the plain engine's, codes come near."""
    plain, raw, codes = (
        torch.tensor([answer["embedding"] for answer in results[f"embedding/{dtype}"]["answers"]]) for dtype in ("auto", *BOTH)
    )
    assert plain.shape[0] == 5 and (plain - raw).abs().max() <= TOLERANCE
    closeness = torch.cosine_similarity(plain, codes)
    # Codes of 4 bits cost a random model percents; an answer that owes nothing to the cache would cost nothing.
    assert (closeness > 0.8).all() and (closeness < 1 - 1e-4).any(), closeness


def test_prefixes_beside_states(results: Results, root: Path) -> None:
    """A prompt of 1000 tokens is shorter than a block, whose length is said at start-up; a longer one is found again."""
    found = results["states/turboquant"]
    assert 1000 < found["block_size"] < 2100
    assert found["metrics"]["prefix_cache_hits"] == found["block_size"]
    said = f"cached prefixes are reused in steps of {found['block_size']} tokens, shorter ones not at all"
    assert sum(said in line for line in lines(root)["states/turboquant"]) == 1
    first, second = answers(results, "states/turboquant"), answers(again(results, "states/turboquant", 0), "again")
    assert [a.tokens for a in first] == [a.tokens for a in second]
    # With the option that the line names, hits end inside a block, which vLLM then copies.
    found = results["finer states/turboquant"]
    assert found["metrics"]["prefix_cache_hits"] == 992 + 2096
    assert sum("reused in steps of 16 tokens" in line for line in lines(root)["finer states/turboquant"]) == 1
    again_finer = answers(again(results, "finer states/turboquant", 0), "again")
    # The state itself is rounded to bf16 at other places of the prompt.
    assert all(abs(a.logprobs[0] - b.logprobs[0]) < BF16_TOLERANCE for a, b in zip(first, again_finer, strict=True))


def test_preemption(results: Results) -> None:
    for dtype in ("auto", *BOTH):
        assert results[f"preemption/{dtype}"]["metrics"]["num_preemptions"] > 0, dtype
    assert_same(answers(results, "llama/auto"), answers(results, f"preemption/{LOSSLESS}"))


def test_grammar(results: Results, smollm2: Path) -> None:
    """Decoded here: vLLM repeats pieces of a prompt that is no text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for dtype in ("auto", *BOTH):
        texts = [tokenizer.decode(one["tokens"], skip_special_tokens=True) for one in results[f"grammar/{dtype}"]["answers"]]
        assert all(re.fullmatch(REGEX, text) for text in texts), texts
        assert len(set(texts)) > 1
    assert_same(*(answers(results, f"grammar/{dtype}") for dtype in ("auto", LOSSLESS)))


def test_adapter(results: Results, root: Path) -> None:
    assert_same(*(answers(results, f"adapter/{dtype}") for dtype in ("auto", LOSSLESS)))
    assert [a.tokens for a in answers(results, "adapter/auto")] != [a.tokens for a in answers(results, "llama/auto")]
    assert any("models that serve LoRA adapters are not handled" in line for line in lines(root)[f"adapter/{K4V4}"])


@pytest.mark.parametrize("dtype", BOTH)
def test_weights_read_again(dtype: str, results: Results) -> None:
    assert_same(answers(results, f"reload/{dtype}"), answers(again(results, f"reload/{dtype}", 0), "again"))


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights(kind: str, results: Results) -> None:
    """Which are computed in bfloat16; attention that is rounded at other places moved a log-probability by 0.02."""
    moved, coded = (deviations(results, f"{kind}/{dtype}", f"{kind}/auto") for dtype in BOTH)
    print(f"{kind}: log-probabilities move by at most {max(moved):.2g}, by codes {max(coded):.2g}")
    assert max(moved) < BF16_TOLERANCE < max(coded)
    assert set(results[f"{kind}/{K4V4}"]["layers"].values()) == {K4V4}


def test_images(results: Results, root: Path) -> None:
    """One picture and another in the same words, and words alone."""
    first, second, _ = answers(results, "images/auto")
    assert first.tokens != second.tokens, "the model does not see"
    assert_same(*(answers(results, f"images/{dtype}") for dtype in ("auto", LOSSLESS)))
    moved, coded = (deviations(results, f"images/{dtype}", "images/auto") for dtype in BOTH)
    print(f"images: log-probabilities move by at most {max(moved):.2g}, by codes {max(coded):.2g}")
    assert max(moved) < TOLERANCE < max(coded) / 50
    for dtype in BOTH:
        assert set(results[f"images/{dtype}"]["layers"].values()) == {dtype}
    assert "keys are stored without calibration: multimodal models are not handled." in lines(root)[f"images/{K4V4}"]


def test_checkpoint_with_a_cache_of_its_own(results: Results, root: Path) -> None:
    """Pages are ours, scales are not applied, and a line says so. The weights are those of llama."""
    assert set(results[f"own cache/{LOSSLESS}"]["layers"].values()) == {LOSSLESS}
    assert_same(answers(results, "llama/auto"), answers(results, f"own cache/{LOSSLESS}"))
    for dtype in BOTH:
        said = "the checkpoint's own KV cache, kv_cache_scheme float8, and its scales are ignored: --kv-cache-dtype "
        assert any(line == f"{said}{dtype} was asked for." for line in lines(root)[f"own cache/{dtype}"])


@pytest.mark.parametrize("skip", SKIPPED)
def test_skipped_layers(skip: str, results: Results, root: Path) -> None:
    """Beside windows: the same answers, and layers, pages and log agree, whether the first layer is skipped or not."""
    assert_same(answers(results, "gemma 3/auto"), answers(results, f"skip {skip}/{LOSSLESS}"))
    found = results[f"skip {skip}/{K4V4}"]
    kept = {int(re.findall(r"\.(\d+)\.", name)[0]) for name, preset in found["layers"].items() if preset is None}
    assert kept == SKIPPED[skip]
    (line,) = (line for line in lines(root)[f"skip {skip}/{K4V4}"] if line.startswith(f"{K4V4}; "))
    names = [name for name, preset in found["layers"].items() if preset is None]
    assert f"{4 - len(kept)} attention layers compressed" in line
    assert f"{len(kept)} not, by --kv-cache-dtype-skip-layers ({', '.join(names)})" in line
    (more,) = re.findall(r" tokens, ([\d.]+)x of auto's", line)
    print(f"skip {skip}: {more}x the tokens")
    assert float(more) > 1.2


@pytest.mark.parametrize("dtype", BOTH)
def test_shared_storage(dtype: str, results: Results) -> None:
    """Blocks that another engine stored, and that this one gave up, answer as those that were never away."""
    plain = "llama/auto" if dtype == LOSSLESS else "plain/turboquant"
    for name in (f"storage/{dtype}", f"storage again/{dtype}"):
        assert results[name]["metrics"]["external_prefix_cache_hits"] > 128
        assert_same(answers(results, plain), answers(results, name))
    assert_same(answers(results, plain), answers(again(results, f"storage/{dtype}", 0), "again"))
