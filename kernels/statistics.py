"""What a calibration run learns of a layer's keys and queries, and how it is carried to positions that the run did not reach."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .basis import BUCKET, MAX_BUCKETS, KeyBasis, balanced_transform, key_basis

# First tokens of a sequence that are left out of the sums: attention sinks spread over a few.
SKIPPED = 4
_GEOMETRIC, _UNIFORM = 16, 8
_IN_BUCKET = 4  # shifts whose average is a bucket's mean


def shifts(served: int) -> list[int]:
    """Where a calibration text is put in a context of ``served`` tokens, at least 16, two thirds of them near its start.

    Rotary embedding turns a head's mean and its quiet directions with position, so one basis is a compromise over the context.
    Uniform shifts alone cost the first thousand tokens, which every request has, twice the divergence of a basis of their own;
    geometric ones alone cost as much at the far end.
    """
    ratio = (served / 8) ** (1 / (_GEOMETRIC - 1))
    geometric = [round(8 * ratio**i) for i in range(_GEOMETRIC - 1)]
    return [0, *geometric, *(served * i // _UNIFORM for i in range(_UNIFORM))]


def bucket_tokens(served: int) -> int:
    """Positions a bucket in a context of ``served`` tokens: `BUCKET`, or the least multiple of it that needs no more buckets than
    `MAX_BUCKETS`.
    """
    return BUCKET * max(1, -(-served // (MAX_BUCKETS * BUCKET)))


def bucket_shifts(served: int, length: int) -> list[list[int]]:
    """Where a calibration text of ``length`` tokens is put for the mean of each bucket: inside it, as far as it fits."""
    size = bucket_tokens(served)
    room = max(size - length, 0)
    inside = [room * i // (_IN_BUCKET - 1) for i in range(_IN_BUCKET)]
    return [[first + shift for shift in inside] for first in range(0, served, size)]


class KeyStatistics:
    """Sums over tokens of one attention layer; keys and queries as they meet in attention, after rotary embedding.

    float64, on the device of what is added: key_sum ``[Hk, d]``, key_moment ``[Hk, d, d]`` (of k k^T), query_moment ``[Hk, d,
    d]`` (of q q^T over all query heads of a KV head), ``tokens``; of first tokens of sequences, whose keys are unlike all others
    and count in none of these, sink_sum ``[Hk, d]``, ``sinks``.

    `spread` adds mean_moment ``[Hk, d, d]``, of m m^T over all tokens, m the mean of a token's shift; and where it is given
    buckets, means ``[Hk, B, d]`` of ``bucket`` positions each.
    """

    def __init__(self, kv_heads: int, head_size: int, device: torch.device) -> None:
        self.tokens = 0.0
        self.key_sum = torch.zeros(kv_heads, head_size, dtype=torch.float64, device=device)
        self.key_moment = torch.zeros(kv_heads, head_size, head_size, dtype=torch.float64, device=device)
        self.query_moment = torch.zeros_like(self.key_moment)
        self.sinks = 0.0
        self.sink_sum = torch.zeros_like(self.key_sum)
        self.bucket = BUCKET
        self.means: torch.Tensor | None = None
        self.mean_moment = torch.zeros_like(self.key_moment)

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

    def spread(self, turns: Iterable[torch.Tensor], buckets: torch.Tensor | None = None, bucket: int = BUCKET) -> KeyStatistics:
        """Their average over shifts of all positions. A shift by p turns every vector by the same R(p), so it turns the sums.

        turns: orthogonal floating ``[d, d]``, R(p) of each shift. buckets: floating ``[B, d, d]``, the average of R(p) over
        shifts inside each bucket of ``bucket`` positions; without, or with one, all positions share a mean.
        """
        result, count = self._empty(self.key_sum.device), 0
        mean = self.key_sum / self.tokens
        outer = self.tokens * mean[:, :, None] * mean[:, None, :]
        result.bucket = bucket
        if buckets is not None and len(buckets) > 1:
            result.means = torch.einsum("bij,hj->hbi", buckets.to(mean), mean)
        for turn in turns:
            r = turn.to(self.key_sum)
            result.key_sum += self.key_sum @ r.T
            result.key_moment += r @ self.key_moment @ r.T
            result.mean_moment += r @ outer @ r.T
            result.query_moment += r @ self.query_moment @ r.T
            count += 1
        result.tokens = self.tokens * count
        # Sequences start at position 0 wherever their later tokens are.
        result.sinks, result.sink_sum = self.sinks, self.sink_sum
        return result

    def to(self, device: torch.device | str) -> KeyStatistics:
        result = self._empty(torch.device(device))
        result.tokens, result.sinks, result.bucket = self.tokens, self.sinks, self.bucket
        for name in ("key_sum", "key_moment", "query_moment", "sink_sum", "mean_moment"):
            setattr(result, name, getattr(self, name).to(device))
        result.means = None if self.means is None else self.means.to(device)
        return result

    def _empty(self, device: torch.device) -> KeyStatistics:
        heads, d = self.key_sum.shape
        return KeyStatistics(heads, d, device)

    def basis(self, *, centred: bool = True, balanced: bool = True) -> KeyBasis:
        """The `KeyBasis` that fits these sums, on the CPU; of one bucket unless `spread` was given several.

        centred: subtract the keys' means; False where a constant in all logits of a query matters (soft cap, sinks). balanced:
        with the transform of `balanced_transform`, else the plain rotation. With buckets, a key's distance is that from its own
        shift's mean. Raises ValueError where a sum is not finite.
        """
        mean = self.key_sum / self.tokens
        if not centred:
            mean = torch.zeros_like(mean)
        means, mean_moment = mean[:, None], mean[:, :, None] * mean[:, None, :]
        if centred and self.means is not None:
            means, mean_moment = self.means, self.mean_moment / self.tokens
        moment = self.key_moment / self.tokens - mean_moment
        if not (moment.isfinite().all() and self.query_moment.isfinite().all()):
            raise ValueError("keys or queries of the calibration run are not finite")
        eye = torch.eye(mean.shape[1], dtype=torch.float64, device=mean.device).expand_as(moment)
        transform = balanced_transform(moment, self.query_moment / self.tokens) if balanced else eye
        return key_basis(transform, means, self.sink_sum / self.sinks, bucket=self.bucket)
