"""Needle retrieval: facts hidden in filler text, each asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..kernels.basis import KeyBasis
from ..texts import prose
from .codecs import Case
from .model import EvaluatedModel

# Names of one length and rhythm, so that only attention to the right sentence tells the numbers apart.
PLACES = ("lighthouse", "monastery", "observatory", "warehouse", "vineyard", "quarry", "cathedral", "sawmill")
FACT = "\n\nThe secret number of the {place} is {number}.\n\n"
QUESTION = "\n\nQuestion: What is the secret number of the {place}?\nAnswer: The secret number of the {place} is"


def haystack(
    tokenizer: Any, length: int, depths: Sequence[float], seed: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, int]]]:
    """Tokens int64 of filler with a fact at each of ``depths``, ascending; and per fact what asks for it.

    Filler and the longest question with its answer make up ``length`` tokens. A question is int64 ``[T]`` and how many of its
    last tokens are the answer. depth: 0 puts a fact first, 1 right before the question. Raises ValueError where ``length`` is
    too short, or where there are more depths than `PLACES`.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    if len(depths) > len(PLACES) or list(depths) != sorted(depths):
        raise ValueError(f"depths {depths}: allowed are {len(PLACES)} at most, in ascending order")
    rng = random.Random(seed)
    named = list(zip(PLACES, rng.sample(range(10_000, 100_000), len(depths)), strict=False))
    prefix = tokenizer.encode("")
    facts = [encode(FACT.format(place=place, number=number)) for place, number in named]
    questions = [(encode(QUESTION.format(place=place)), encode(f" {number}")) for place, number in named]
    asked = max(len(question) + len(answer) for question, answer in questions)
    room = length - len(prefix) - sum(map(len, facts)) - asked
    filler = encode(prose("held-out")[: 10 * length])
    if not 0 < room <= len(filler):
        raise ValueError(f"no room for needles in {length} tokens")
    ids, done = prefix, 0
    for depth, fact in zip(depths, facts, strict=True):
        ids = ids + filler[done : round(depth * room)] + fact
        done = round(depth * room)
    ids = ids + filler[done:room]
    asking = [(torch.tensor(question + answer, dtype=torch.int64), len(answer)) for question, answer in questions]
    return torch.tensor(ids, dtype=torch.int64), asking


def retrieval(
    model: EvaluatedModel,
    cases: Sequence[Case],
    lengths: Sequence[int],
    depths: Sequence[float],
    bases: Sequence[KeyBasis] | None = None,
) -> list[list[bool]]:
    """For each case, whether greedy decoding gives the whole answer; in the order of lengths, then depths.

    The filler's own keys and values come from an exact prefill, as those of a prompt in a server. Question and answer read
    all of them as the case stores them. Teacher-forced: greedy decoding gives the answer if and only if each of its tokens is
    the most likely one after the true ones.
    """
    found: list[list[bool]] = [[] for _ in cases]
    for seed, length in enumerate(lengths):
        ids, questions = haystack(model.tokenizer, length, depths, seed)
        before = model.prefilled(ids)
        rounds = [(case, results, *asked) for case, results in zip(cases, found, strict=True) for asked in questions]
        for case, results, question, answer in tqdm(rounds, unit="question", disable=None):
            hidden = model.hidden(question[:-1], case, bases, before)[-answer:]
            results.append(bool((model.logits(hidden).argmax(-1).cpu() == question[-answer:]).all()))
    return found
