"""Triton helpers of a softmax that meets its scores tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cap_scores(scores, soft_cap):
    """``soft_cap * tanh(scores / soft_cap)``."""
    return soft_cap * (2.0 / (1.0 + tl.exp(-2.0 * scores / soft_cap)) - 1.0)


@triton.jit
def add_scores(scores, peak, total):
    """Adds a tile of scores fp32 ``[M, N]``, -inf where unseen, to maximum and sum ``[M]``. Returns weights ``[M, N]``, the
    factor ``[M]`` of what was summed before, and the new maximum and sum.
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp(scores - base[:, None])
    shrink = tl.exp(peak - base)
    return weights, shrink, new_peak, total * shrink + tl.sum(weights, axis=1)
