"""Causal attention over plain vectors, in the precision they have: the arithmetic of ``kernels.reference`` without pages."""

from __future__ import annotations

import math

import torch

_QUERY_ROWS = 256  # rows attended at once: bounds the score matrix of a long prefill


def _attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q ``[R, Hk, G, d]``, k and v ``[L, Hk, d]``, visible bool ``[R, L]``; returns ``[R, Hk, G, d]``."""
    scores = torch.einsum("rhgd,lhd->hgrl", q, k) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(k.shape[1], -1, 1, 1)
        peak = torch.maximum(peak, sinks)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - peak)
    # A hidden token's weight is exactly 0, but 0 * NaN is NaN: a non-finite value may reach only rows that see it.
    broken = ~torch.isfinite(v).all(-1)
    out = torch.einsum("hgrl,lhd->rhgd", weights / total, v.masked_fill(broken[..., None], 0.0))
    if broken.any():
        reached = (visible.to(q.dtype) @ broken.to(q.dtype)) > 0
        out = out.masked_fill(reached[:, :, None, None], math.nan)
    return out


def attend_last(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of a sequence's last rows q ``[R, Hk, G, d]`` over its k and v ``[L, Hk, d]``; ``[R, Hk, G, d]``."""
    rows, length = q.shape[0], k.shape[0]
    column = torch.arange(length, device=q.device)
    parts = []
    for begin in range(0, rows, _QUERY_ROWS):
        end = min(rows, begin + _QUERY_ROWS)
        position = column[length - rows + begin : length - rows + end, None]
        visible = column <= position
        if window is not None:
            visible &= column > position - window
        parts.append(_attend_rows(q[begin:end], k, v, visible, scale, soft_cap, sinks))
    return torch.cat(parts)


def attend_raw(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Causal attention of one whole sequence over its own keys and values, without pages; options as in `attend`.

    query: floating ``[T, Hq, d]``. key, value: floating ``[T, Hk, d]``. Returns ``[T, Hq, d]`` in ``dtype``.
    """
    q, k, v = (x.to(dtype) for x in (query, key, value))
    return attend_last(q.unflatten(1, (k.shape[1], -1)), k, v, scale, window, soft_cap, sinks).flatten(1, 2)
