"""Needle retrieval: a fact hidden in filler text, asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.basis import KeyBasis
from ..texts import prose
from .codecs import Case
from .model import EvaluatedModel

FACT = "\n\nThe secret number of the lighthouse is {number}.\n\n"
QUESTION = "\n\nQuestion: What is the secret number of the lighthouse?\nAnswer: The secret number of the lighthouse is"


def needle(tokenizer: Any, length: int, depth: float, seed: int) -> tuple[torch.Tensor, int]:
    """Tokens int64 ``[length]`` of filler, fact, filler, question and answer; and how many last tokens are the answer.

    depth: 0 puts the fact first, 1 right before the question. Raises ValueError where ``length`` is too short.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    number = str(random.Random(seed).randrange(10_000, 100_000))
    prefix = tokenizer.encode("")
    fact, question, answer = encode(FACT.format(number=number)), encode(QUESTION), encode(f" {number}")
    room = length - len(prefix) - len(fact) - len(question) - len(answer)
    filler = encode(prose("held-out")[: 10 * length])
    if not 0 < room <= len(filler):
        raise ValueError(f"no room for a needle in {length} tokens")
    before = round(depth * room)
    ids = prefix + filler[:before] + fact + filler[before:room] + question + answer
    return torch.tensor(ids, dtype=torch.int64), len(answer)


def retrieval(
    model: EvaluatedModel,
    cases: Sequence[Case],
    lengths: Sequence[int],
    depths: Sequence[float],
    bases: Sequence[KeyBasis] | None = None,
) -> list[list[bool]]:
    """For each case, whether greedy decoding gives the whole answer; needles in the order of lengths, then depths.

    Teacher-forced: greedy decoding gives the answer if and only if each of its tokens is the most likely one after the true
    ones.
    """
    places = [(length, depth) for length in lengths for depth in depths]
    found: list[list[bool]] = [[] for _ in cases]
    for seed, (length, depth) in enumerate(places):
        ids, answer = needle(model.tokenizer, length, depth, seed)
        for case, results in zip(cases, found, strict=True):
            hidden = model.hidden(ids[:-1], case, bases)[-answer:]
            results.append(bool((model.logits(hidden).argmax(-1).cpu() == ids[-answer:]).all()))
    return found
