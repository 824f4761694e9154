"""Key bases of a model in transformers, for evaluations without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from ..kernels.basis import KeyBasis
from ..kernels.statistics import bucket_shifts, bucket_tokens, shifts
from ..texts import CALIBRATION_CONTEXT, CALIBRATION_TOKENS, blocks
from .codecs import Case
from .model import EvaluatedModel


def served_model(path: str, cases: Sequence[Case], served: int) -> tuple[EvaluatedModel, list[KeyBasis] | None]:
    """The model in a folder as engines for ``served`` tokens have it: data-free cases without the key bias, and the bases of the
    calibrated ones, None where there are none.
    """
    model = EvaluatedModel(path)
    model.subtract_key_bias(served)
    return model, calibrate(model, served) if any(case.calibrated for case in cases) else None


def calibrate(model: EvaluatedModel, served: int, texts: Sequence[torch.Tensor] | None = None) -> list[KeyBasis]:
    """One a layer, of token sequences int64 ``[T]`` as if they stood at `shifts` of a context of ``served`` tokens, with means by
    the buckets of that context.

    texts: by default those that an engine would be calibrated on.
    """
    if texts is None:
        texts = blocks(model.tokenizer, "calibration", CALIBRATION_TOKENS, CALIBRATION_CONTEXT)
    longest = max(len(text) for text in texts)
    turned = {}
    for kind in set(model.rotary_kinds):
        buckets = torch.stack([torch.stack(model.turns(inside, kind)).mean(0) for inside in bucket_shifts(served, longest)])
        turned[kind] = model.turns(shifts(served), kind), buckets
    bar = tqdm(texts, "calibrating keys", unit="text", disable=None)
    layers = zip(model.statistics(bar), model.rotary_kinds, strict=True)
    return [statistics.spread(*turned[kind], bucket_tokens(served)).basis() for statistics, kind in layers]
