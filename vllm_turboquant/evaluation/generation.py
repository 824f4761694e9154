"""Agreement over long generations: for how long a cache's greedy text is the one that exact keys and values give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..kernels.basis import KeyBasis
from .codecs import Case
from .model import EvaluatedModel


@dataclass(frozen=True)
class Agreement:
    """Of one cache with exact keys and values, over greedy texts of ``tokens`` tokens each.

    same: of each text, how many tokens greedy decoding from this cache gives as well before the first that differs.
    top1: the share of all tokens that are also the likeliest from this cache after the true ones.
    """

    tokens: int
    same: list[int]
    top1: float


def agreements(
    model: EvaluatedModel,
    cases: Sequence[Case],
    prompts: Sequence[torch.Tensor],
    tokens: int,
    bases: Sequence[KeyBasis] | None = None,
) -> list[Agreement]:
    """Each case's agreement over ``tokens`` tokens after each prompt, int64 ``[T]``.

    Teacher-forced on the exact model's greedy text: up to the first token that is not the likeliest, greedy decoding from the
    cache gives the same text. The end of text is a token like others, so that all texts are equally long.
    """
    hits: list[list[torch.Tensor]] = [[] for _ in cases]
    for prompt in tqdm(prompts, unit="text", disable=None):
        ids = model.continued(prompt, tokens)
        for case, found in zip(cases, hits, strict=True):
            hidden = model.hidden(ids[:-1], case, bases)[len(prompt) - 1 :]
            found.append(model.logits(hidden).argmax(-1).cpu() == ids[len(prompt) :])
    return [
        Agreement(tokens, [int(hit.long().cumprod(0).sum()) for hit in found], float(torch.stack(found).double().mean()))
        for found in hits
    ]
