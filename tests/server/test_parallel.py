"""Speculative decoding and several ranks over lossless pages: the answers of the plain server. Codes lose as much too."""

from __future__ import annotations

import json
import random
import re
import statistics
from pathlib import Path

import pytest

from tests.plugin.test_doctor import doctor

from .answers import assert_same, complete, story
from .features import UNCALIBRATED
from .harness import LOSSLESS, Flags, Server, ServerPool, side_by_side
from .shapes import VOCABULARY
from .test_engines import Results, answers, run_jobs
from .test_kinds import K4V4, LLM, fresh_prompts, lines
from .test_lossless import EXTRA, flags
from .weights import real_weights

SMALL = ("--max-model-len=512", "--max-num-batched-tokens=128", "--kv-cache-memory-bytes=64M", "--block-size=32")
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def test_ngram_speculation(pool: ServerPool, smollm2: Path, rng: random.Random) -> None:
    """The verified rows see the drafts before them, and a rejected draft's slot is overwritten."""
    speculating = Flags(smollm2, LOSSLESS, extra=(*EXTRA, f"--speculative-config={json.dumps(NGRAM)}"))
    pair = pool.get(flags(smollm2, LOSSLESS), speculating)
    # Half of a text repeated: the model goes on copying, and n-grams of the prompt predict it.
    texts = [story(rng, 25) for _ in range(3)]
    prompts = [f"{text}\n\n{text[: len(text) // 2]}" for text in texts]
    plain, speculated = side_by_side(
        *(lambda s=s: side_by_side(*(lambda p=p: complete(s, p, 24) for p in prompts)) for s in pair)
    )
    drafted = pair[1].metric("vllm:spec_decode_num_draft_tokens_total")
    accepted = pair[1].metric("vllm:spec_decode_num_accepted_tokens_total")
    print(f"{drafted:.0f} tokens drafted, {accepted:.0f} accepted")
    assert 0 < accepted < drafted
    assert_same(plain, speculated)


def on_ranks(pool: ServerPool, model: Path, kv: str, kind: str = "tensor") -> list[Server]:
    """A server of one rank and one of two."""
    two = Flags(model, kv, extra=(*SMALL, f"--{kind}-parallel-size=2"), cores=2)
    return pool.get(Flags(model, kv, extra=SMALL), two)


def test_tensor_parallel(pool: ServerPool, tiny_models: dict[str, Path], rng: random.Random) -> None:
    pair = on_ranks(pool, tiny_models["llama"], LOSSLESS)
    prompts = [story(rng, words) for words in (2, 30, 90)]
    single, parallel = side_by_side(*(lambda s=s: [complete(s, p, 24) for p in prompts] for s in pair))
    assert_same(single, parallel)
    assert len({tuple(a.tokens) for a in single}) == len(prompts), "the model answers the same whatever is asked"
    # Each rank holds one of the two KV heads, so the same memory a rank holds twice the tokens.
    assert pair[1].cache_tokens() == 2 * pair[0].cache_tokens()


def test_replicas(pool: ServerPool, tiny_models: dict[str, Path], rng: random.Random) -> None:
    """Data parallelism; doctor repeats what each of both engines logged."""
    pair = on_ranks(pool, tiny_models["llama"], LOSSLESS, "data")
    prompts = [story(rng, words) for words in (2, 30, 90, 7)]
    single, parallel = side_by_side(*(lambda s=s: side_by_side(*(lambda p=p: complete(s, p, 24) for p in prompts)) for s in pair))
    assert_same(single, parallel)
    code, facts, _ = doctor("--url", pair[1].url, TURBOQUANT_DEBUG="1")
    assert code == 0, facts
    told = [fact["detail"].split(" | ") for name, fact in facts.items() if name.startswith("compression")]
    assert len(told) == 2 and all(len(lines) == 2 for lines in told)
    assert {line.split("; ")[0] for lines in told for line in lines} == {LOSSLESS}


def prompt_logprobs(server: Server, prompts: list[str]) -> list[float]:
    """Of the prompts' own tokens: on a CPU their context is read back from the pages."""
    found: list[float] = []
    for text in prompts:
        result = server.client().completions.create(model="m", prompt=text, max_tokens=1, temperature=0, logprobs=1, echo=True)
        logprobs = result.choices[0].logprobs
        assert logprobs is not None and logprobs.token_logprobs
        found += [x for x in logprobs.token_logprobs[:-1] if x is not None]
    return found


def test_ranks_calibrate_their_own_heads(pool: ServerPool, tiny_models: dict[str, Path], rng: random.Random) -> None:
    """Three-bit codes of the default calibration cost two ranks what they cost one."""
    prompts = [story(rng, 90) for _ in range(3)]
    exact = prompt_logprobs(on_ranks(pool, tiny_models["llama"], LOSSLESS)[0], prompts)
    pair = on_ranks(pool, tiny_models["llama"], "turboquant-k3v3")
    found = side_by_side(*(lambda s=s: prompt_logprobs(s, prompts) for s in pair))
    assert all("calibrated in" in server.log() for server in pair)
    moved = [statistics.mean(abs(x - y) for x, y in zip(one, exact, strict=True)) for one in found]
    apart = statistics.mean(abs(x - y) for x, y in zip(*found, strict=True))
    print(f"log-probabilities moved by {moved[0]:.4f} on one rank, {moved[1]:.4f} on two, {apart:.4f} apart")
    # Sums over tokens and heads are rounded in other orders, which flips few codes.
    assert apart < 0.2 * moved[0] and abs(moved[1] / moved[0] - 1) < 0.05


DEPTH = 3  # layers, which two stages cannot share equally
# vLLM makes the buffers of later stages while it warms up, which on a CPU it does only where it compiles: here by a compiler that
# does nothing. With --enforce-eager the first request ends the engine there, with dtype auto as well.
STAGED = {
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
STAGES_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",  # two threads of each stage would wait for each other on two cores
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "0",
}
FALLBACK = "pipeline parallelism is not handled"
# Job to dtype, what stands for the job on one rank, and the words on calibration.
PIPELINES = {
    "lossless": (LOSSLESS, "auto", "keys exact"),
    "default": (K4V4, "uncalibrated", f"not calibrated: {FALLBACK}"),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def pipelines(log: Path) -> Results:
    job = {"prompts": fresh_prompts(), "max_tokens": 24}
    llm = LLM | {"model": real_weights(log, VOCABULARY, DEPTH), "load_format": "auto"}
    engines = {
        "auto": {"kv_cache_dtype": "auto"},
        "uncalibrated": {"kv_cache_dtype": K4V4} | UNCALIBRATED,
        "lossless": {"kv_cache_dtype": LOSSLESS} | STAGED,
        "default": {"kv_cache_dtype": K4V4} | STAGED,
    }
    jobs = [job | {"name": name, "llm": llm | engine} for name, engine in engines.items()]
    return run_jobs(jobs, log, VLLM_CACHE_ROOT=str(log / "cache"), **STAGES_ENVIRONMENT)


@pytest.mark.parametrize("case", PIPELINES)
def test_pipeline_stages(case: str, pipelines: Results, log: Path) -> None:
    """The answers of one rank, from codes too, as uncalibrated ones are the same. Each stage says what it has; together they have
    every layer once."""
    dtype, reference, calibration = PIPELINES[case]
    assert_same(answers(pipelines, reference), answers(pipelines, case))
    held = [stage["compressed"] for stage in pipelines[case]["stages"]]
    assert sorted(name for names in held for name in names) == [f"model.layers.{index}.self_attn.attn" for index in range(DEPTH)]
    assert len(held) == 2 and len(held[0]) != len(held[1])
    said = [line for line in lines(log)[case] if line.startswith(dtype)]
    assert len(said) == 2
    for stage, names in enumerate(held):
        (line,) = (line for line in said if f"{dtype}, pipeline stage {stage + 1} of 2; " in line)
        assert f"; {len(names)} attention layers compressed " in line and f"; {calibration}" in line
        # Though the blocks of both are as many as the larger stage has memory for.
        (more,) = re.findall(r" tokens, ([\d.]+)x of auto's", line)
        (fewer,) = re.findall(r" bytes per token \(([\d.]+)x\)", line)
        assert float(more) == pytest.approx(float(fewer), rel=0.02)
    warned = [line for line in lines(log)[case] if line == f"keys are stored without calibration: {FALLBACK}."]
    assert len(warned) == (case == "default")


def test_pipeline_comparison_can_fail(pipelines: Results) -> None:
    assert [a.tokens for a in answers(pipelines, "auto")] != [a.tokens for a in answers(pipelines, "default")]
