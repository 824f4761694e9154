"""Key bases of a model in transformers, for evaluations without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.basis import KeyBasis
from .model import EvaluatedModel

_GEOMETRIC, _UNIFORM = 16, 8


def shifts(served: int) -> list[int]:
    """Where a calibration text is put in a context of ``served`` tokens, at least 16, two thirds of them near its start.

    Rotary embedding turns a head's mean and its quiet directions with position, so one basis is a compromise over the context.
    Uniform shifts alone cost the first thousand tokens, which every request has, twice the divergence of a basis of their own;
    geometric ones alone cost as much at the far end.
    """
    ratio = (served / 8) ** (1 / (_GEOMETRIC - 1))
    geometric = [round(8 * ratio**i) for i in range(_GEOMETRIC - 1)]
    return [0, *geometric, *(served * i // _UNIFORM for i in range(_UNIFORM))]


def calibrate(model: EvaluatedModel, texts: Sequence[torch.Tensor], served: int) -> list[KeyBasis]:
    """One a layer, of token sequences int64 ``[T]`` as if they stood at `shifts` of a context of ``served`` tokens."""
    turns = model.turns(shifts(served))
    return [statistics.spread(turns).basis() for statistics in model.statistics(texts)]
