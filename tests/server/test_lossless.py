"""Plumbing: raw numbers in our pages and our attention must answer as vLLM's own cache and kernels do, token for token.

float32 on purpose. In bfloat16 logits are multiples of 1/16 or 1/8, so the two best tokens often tie exactly, and two
attention kernels that round in different places break the tie differently: of 16 answers of 24 tokens 13 agreed, every
difference at a tie or one step from it, where float32 agreed in all. Such a test would measure rounding, not plumbing.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from .answers import LOGPROB_TOLERANCE, assert_same, chat, complete, story
from .harness import LOSSLESS, Flags, Server, ServerPool, side_by_side

CHUNK = 256  # tokens of one prefill step
BLOCK = 32
CONTEXT = 1024
# The smallest pool that vLLM accepts for this context: one block is vLLM's own.
POOL_BLOCKS = CONTEXT // BLOCK + 1
EXTRA = (
    f"--max-model-len={CONTEXT}",
    f"--max-num-batched-tokens={CHUNK}",
    f"--block-size={BLOCK}",
    f"--num-gpu-blocks-override={POOL_BLOCKS}",
    "--kv-cache-memory-bytes=256M",
)


def flags(model: Path, kv: str) -> Flags:
    return Flags(model, kv, extra=EXTRA)


@pytest.fixture
def pair(pool: ServerPool, smollm2: Path) -> list[Server]:
    """The server with dtype auto and the one with the lossless codec."""
    return pool.get(flags(smollm2, "auto"), flags(smollm2, LOSSLESS))


def test_completion(pair: list[Server], rng: random.Random) -> None:
    prompts = ["The capital of France is", *(story(rng, 5) for _ in range(2))]
    auto, lossless = side_by_side(*(lambda s=s: [complete(s, p, 24) for p in prompts] for s in pair))
    assert_same(auto, lossless)


def test_chat(pair: list[Server], rng: random.Random) -> None:
    questions = ["What is the capital of France?", f"Tell me about a {story(rng, 3)}."]
    auto, lossless = side_by_side(*(lambda s=s: [chat(s, q, 24) for q in questions] for s in pair))
    assert_same(auto, lossless)


def _streamed(server: Server, prompt: str) -> tuple[list[str], list[str]]:
    pieces = [
        event.choices[0].text
        for event in server.client().completions.create(
            model="m", prompt=prompt, max_tokens=16, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
    ]
    chat_pieces = [
        event.choices[0].delta.content or ""
        for event in server.client().chat.completions.create(
            model="m", messages=[{"role": "user", "content": prompt}], max_tokens=16, temperature=0, stream=True
        )
    ]
    return pieces, chat_pieces


def test_streaming(pair: list[Server]) -> None:
    # A fixed prompt: streamed events carry no values by which a tie could be told from a fault.
    prompt = "The three primary colours are"
    auto, lossless = side_by_side(*(lambda s=s: _streamed(s, prompt) for s in pair))
    for kind in (0, 1):
        assert len(lossless[kind]) > 4, "the answer came in one piece"
        assert "".join(lossless[kind]) == "".join(auto[kind]) != ""
    assert "".join(lossless[0]) == complete(pair[1], prompt, 16).text


def _prompt_logprobs(server: Server, prompt: str) -> list[float]:
    """Log-probability of each prompt token after the first: the same text on every server, whatever it would say."""
    result = server.client().completions.create(
        model="m", prompt=prompt, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    steps = result.choices[0].model_extra["prompt_logprobs"]  # type: ignore[index]
    return [next(iter(step.values()))["logprob"] for step in steps if step]


def test_logprobs_of_a_given_text(pair: list[Server], rng: random.Random) -> None:
    prompt = story(rng, 100)
    auto, lossless = side_by_side(*(lambda s=s: _prompt_logprobs(s, prompt) for s in pair))
    assert len(auto) == len(lossless) > CHUNK
    worst = max(abs(a - b) for a, b in zip(auto, lossless, strict=True))
    print(f"{len(auto)} tokens, log-probabilities differ by at most {worst:.2g}")
    assert worst <= LOGPROB_TOLERANCE


def test_16_concurrent_requests(pair: list[Server], rng: random.Random) -> None:
    prompts = [story(rng, 4) for _ in range(16)]  # one or two blocks each: the pool holds all of them at once
    peaks = [0.0, 0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for i, server in enumerate(pair):
                peaks[i] = max(peaks[i], server.metric("vllm:num_requests_running"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        auto, lossless = side_by_side(
            *(lambda s=s: side_by_side(*(lambda p=p: complete(s, p, 24) for p in prompts)) for s in pair)
        )
    finally:
        done.set()
        watcher.join()
    assert_same(auto, lossless)
    # Samples of a gauge that the engine sets once a step: what they show is a bound from below.
    assert min(peaks) > 2, f"only {peaks} requests ran at once"


def test_prompt_of_several_prefill_chunks_and_its_prefix_cache_hit(pair: list[Server], rng: random.Random) -> None:
    prompt = story(rng, 200)
    auto, lossless = side_by_side(*(lambda s=s: complete(s, prompt, 16) for s in pair))
    assert auto.prompt_tokens > 2 * CHUNK
    assert_same([auto], [lossless])

    hits = [s.metric("vllm:prefix_cache_hits_total") for s in pair]
    again = side_by_side(*(lambda s=s: complete(s, prompt, 16) for s in pair))
    for server, before in zip(pair, hits, strict=True):
        hit = server.metric("vllm:prefix_cache_hits_total") - before
        assert hit >= auto.prompt_tokens - 2 * BLOCK, f"{server.name}: {hit} of {auto.prompt_tokens} tokens hit"
    assert_same([auto, auto], again)


def test_preemption(pair: list[Server], rng: random.Random) -> None:
    # 2 blocks each and 2 more while they answer: 64 in all, of 32. Whoever finishes or comes late makes room for one that waits.
    prompts, length = [story(rng, 12) for _ in range(16)], 64
    before = [s.metric("vllm:num_preemptions_total") for s in pair]
    auto, lossless = side_by_side(
        *(lambda s=s: side_by_side(*(lambda p=p: complete(s, p, length) for p in prompts)) for s in pair)
    )
    counted = [s.metric("vllm:num_preemptions_total") - b for s, b in zip(pair, before, strict=True)]
    print(f"preemptions: {counted}")
    assert min(counted) > 0
    assert_same(auto, lossless)
    # The same answers from requests that had the pool to themselves.
    assert_same(lossless[:2], [complete(pair[1], p, length) for p in prompts[:2]])
