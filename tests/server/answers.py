"""What a server answered, and when two servers' answers count as the same."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .harness import Server

# Two kernels that sum float32 in different orders differ by up to 2e-5 in a log-probability (SmolLM2, 30 layers, 1500
# tokens measured). Ten times that is still 600 times less than what 4-bit pages change on average.
LOGPROB_TOLERANCE = 2e-4
# Greedy decoding is a coin toss where the two best tokens are nearer to each other than rounding. The nearest pair in
# 1500 measured tokens was 4e-3 apart: about one run in ten meets a pair below this bound; rounding flips few of them.
TIE = 4e-4

# fmt: off
WORDS = [
    "river", "stone", "garden", "window", "copper", "letter", "winter", "bridge", "market", "silver", "captain",
    "forest", "mirror", "thunder", "violin", "harbor", "candle", "desert", "planet", "engine", "teacher", "basket",
    "island", "shadow", "needle", "castle", "feather", "pepper", "ocean", "tunnel", "blanket", "hammer", "lantern",
    "meadow", "orchid", "pigeon", "ribbon", "saddle", "temple", "velvet",
]
# fmt: on


def story(rng: random.Random, words: int) -> str:
    """A prompt of about ``3 * words + 10`` tokens that no other test has sent."""
    return "A short story about a " + ", a ".join(rng.choice(WORDS) for _ in range(words)) + ". Once upon a time"


@dataclass(frozen=True)
class Answer:
    """``gaps``: by how much the best token was ahead of the second, in log-probability."""

    text: str
    tokens: list[str]
    logprobs: list[float]
    gaps: list[float]
    prompt_tokens: int = 0


def _gap(values: Iterable[float]) -> float:
    best, second = sorted(values, reverse=True)[:2]
    return best - second


def complete(server: Server, prompt: str, max_tokens: int, **extra: Any) -> Answer:
    """Greedy completion. The end of text is ignored, so that every answer has ``max_tokens`` tokens to compare."""
    result = server.client().completions.create(
        model="m",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=2,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True} | extra,
    )
    choice, usage = result.choices[0], result.usage
    assert usage is not None and usage.completion_tokens == max_tokens, result
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs, result
    gaps = [_gap(step.values()) for step in logprobs.top_logprobs if step]
    return Answer(choice.text, logprobs.tokens, [x for x in logprobs.token_logprobs if x is not None], gaps, usage.prompt_tokens)


def chat(server: Server, question: str, max_tokens: int) -> Answer:
    result = server.client().chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    choice, usage = result.choices[0], result.usage
    assert usage is not None and usage.completion_tokens == max_tokens, result
    assert choice.message.content and choice.logprobs is not None and choice.logprobs.content, result
    steps = choice.logprobs.content
    gaps = [_gap(top.logprob for top in step.top_logprobs) for step in steps]
    return Answer(choice.message.content, [s.token for s in steps], [s.logprob for s in steps], gaps, usage.prompt_tokens)


def parting(one: Sequence[object], other: Sequence[object]) -> int | None:
    """The first place at which two texts of one length differ; None where they are the same."""
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y), None)


def assert_same(expected: Sequence[Answer], got: Sequence[Answer]) -> None:
    """Token for token, values within rounding. One answer may part at a tie, from where on it is another text."""
    assert len(expected) == len(got) > 0
    ties, worst = 0, 0.0
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert len(a.tokens) == len(b.tokens) == len(a.logprobs) == len(b.logprobs) == len(a.gaps)
        parted = parting(a.tokens, b.tokens)
        common = len(a.tokens) if parted is None else parted
        worst = max([worst, *(abs(x - y) for x, y in zip(a.logprobs[:common], b.logprobs[:common], strict=True))])
        if common == len(a.tokens):
            assert a.text == b.text
            continue
        where = f"answer {number} parts at token {common}: {a.text!r} and {b.text!r}"
        assert a.gaps[common] < TIE, f"{where}; the best two tokens were {a.gaps[common]:.2g} apart"
        print(f"tie: {where}")
        ties += 1
    print(f"{len(got)} answers, {sum(len(a.tokens) for a in got)} tokens, log-probabilities differ by at most {worst:.2g}")
    assert worst <= LOGPROB_TOLERANCE
    assert ties <= 1
