"""Key bases of a model in transformers, for evaluations without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.basis import KeyBasis
from ..kernels.statistics import bucket_shifts, bucket_tokens, shifts
from .model import EvaluatedModel


def calibrate(model: EvaluatedModel, texts: Sequence[torch.Tensor], served: int) -> list[KeyBasis]:
    """One a layer, of token sequences int64 ``[T]`` as if they stood at `shifts` of a context of ``served`` tokens, with means by
    the buckets of that context.
    """
    turns = model.turns(shifts(served))
    buckets = torch.stack(
        [torch.stack(model.turns(inside)).mean(0) for inside in bucket_shifts(served, max(len(text) for text in texts))]
    )
    spread = (statistics.spread(turns, buckets, bucket_tokens(served)) for statistics in model.statistics(texts))
    return [statistics.basis() for statistics in spread]
