"""What a calibration run learns of a layer's keys and queries, and how it is carried to positions that the run did not reach."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .basis import KeyBasis, balanced_transform, key_basis

# First tokens of a sequence that are left out of the sums: attention sinks spread over a few.
SKIPPED = 4
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


class KeyStatistics:
    """Sums over tokens of one attention layer; keys and queries as they meet in attention, after rotary embedding.

    float64, on the device of what is added: key_sum ``[Hk, d]``, key_moment ``[Hk, d, d]`` (of k k^T), query_moment ``[Hk, d,
    d]`` (of q q^T over all query heads of a KV head), ``tokens``; of first tokens of sequences, whose keys are unlike all others
    and count in none of these, sink_sum ``[Hk, d]``, ``sinks``.
    """

    def __init__(self, kv_heads: int, head_size: int, device: torch.device) -> None:
        self.tokens = 0.0
        self.key_sum = torch.zeros(kv_heads, head_size, dtype=torch.float64, device=device)
        self.key_moment = torch.zeros(kv_heads, head_size, head_size, dtype=torch.float64, device=device)
        self.query_moment = torch.zeros_like(self.key_moment)
        self.sinks = 0.0
        self.sink_sum = torch.zeros_like(self.key_sum)

    def add(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """One sequence from its start, at positions 0, 1, ...

        query: floating ``[T, Hq, d]``, key: floating ``[T, Hk, d]``; query heads of a KV head lie side by side.
        """
        heads = key.shape[1]
        self.sinks += 1
        self.sink_sum += key[0]
        query, key = query[SKIPPED:], key[SKIPPED:]
        self.tokens += key.shape[0]
        # Products of a chunk in fp32, whose sums of squares err by 1e-6; sums of chunks in fp64.
        k, q = key.float().transpose(0, 1), query.float().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
        self.key_sum += k.sum(1)
        self.key_moment += k.mT @ k
        self.query_moment += q.mT @ q

    def spread(self, turns: Iterable[torch.Tensor]) -> KeyStatistics:
        """Their average over shifts of all positions. A shift by p turns every vector by the same R(p), so it turns the sums.

        turns: orthogonal floating ``[d, d]``, R(p) of each shift.
        """
        result, count = self._empty(self.key_sum.device), 0
        for turn in turns:
            r = turn.to(self.key_sum)
            result.key_sum += self.key_sum @ r.T
            result.key_moment += r @ self.key_moment @ r.T
            result.query_moment += r @ self.query_moment @ r.T
            count += 1
        result.tokens = self.tokens * count
        # Sequences start at position 0 wherever their later tokens are.
        result.sinks, result.sink_sum = self.sinks, self.sink_sum
        return result

    def to(self, device: torch.device | str) -> KeyStatistics:
        result = self._empty(torch.device(device))
        result.tokens, result.sinks = self.tokens, self.sinks
        for name in ("key_sum", "key_moment", "query_moment", "sink_sum"):
            setattr(result, name, getattr(self, name).to(device))
        return result

    def _empty(self, device: torch.device) -> KeyStatistics:
        heads, d = self.key_sum.shape
        return KeyStatistics(heads, d, device)

    def basis(self, *, centred: bool = True, balanced: bool = True) -> KeyBasis:
        """The `KeyBasis` that fits these sums, on the CPU.

        centred: subtract the keys' mean; False where a constant in all logits of a query matters (soft cap, sinks). balanced:
        with the transform of `balanced_transform`, else the plain rotation. Raises ValueError where a sum is not finite.
        """
        mean = self.key_sum / self.tokens
        if not centred:
            mean = torch.zeros_like(mean)
        moment = self.key_moment / self.tokens - mean[:, :, None] * mean[:, None, :]
        if not (moment.isfinite().all() and self.query_moment.isfinite().all()):
            raise ValueError("keys or queries of the calibration run are not finite")
        eye = torch.eye(mean.shape[1], dtype=torch.float64, device=mean.device).expand_as(moment)
        transform = balanced_transform(moment, self.query_moment / self.tokens) if balanced else eye
        return key_basis(transform, mean, self.sink_sum / self.sinks)
