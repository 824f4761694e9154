"""Key bases of a model in transformers, for evaluations without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.basis import KeyBasis
from ..kernels.statistics import shifts
from .model import EvaluatedModel


def calibrate(model: EvaluatedModel, texts: Sequence[torch.Tensor], served: int) -> list[KeyBasis]:
    """One a layer, of token sequences int64 ``[T]`` as if they stood at `shifts` of a context of ``served`` tokens."""
    turns = model.turns(shifts(served))
    return [statistics.spread(turns).basis() for statistics in model.statistics(texts)]
