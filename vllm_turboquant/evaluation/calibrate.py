"""Key bases of a model in transformers, for evaluations without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.basis import KeyBasis
from .model import EvaluatedModel

SHIFTS = 16


def calibrate(model: EvaluatedModel, texts: Sequence[torch.Tensor], served: int) -> list[KeyBasis]:
    """One a layer, of token sequences int64 ``[T]`` as if they stood at `SHIFTS` places of a context of ``served`` tokens."""
    shifts = [served * i // SHIFTS for i in range(SHIFTS)]
    turns = model.turns(shifts)
    return [statistics.spread(turns).basis() for statistics in model.statistics(texts)]
