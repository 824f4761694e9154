"""Slow, independent attention in float64 over the *decoded* cache: one token, one head, one score at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_turboquant.kernels.basis import KeyBasis, balanced_transform, key_basis, of_bucket
from vllm_turboquant.kernels.format import PageFormat
from vllm_turboquant.kernels.reference import load
from vllm_turboquant.kernels.rotation import rotation


@dataclass
class Batch:
    """A paged batch as vLLM hands it over."""

    fmt: PageFormat
    cache: torch.Tensor  # uint8 [B, H, N, C]
    block_table: torch.Tensor  # int32 [R, blocks]
    seq_lens: torch.Tensor  # int32 [R]
    query_start_loc: torch.Tensor  # int32 [R + 1]
    query: torch.Tensor  # float64 [T, Hq, d]
    keys: list[torch.Tensor]  # per request [L, Hk, d]
    values: list[torch.Tensor]


def decoded(batch: Batch, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a request in the model's own basis, token by token through the block table."""
    size = batch.cache.shape[2]
    keys, values = [], []
    for position in range(int(batch.seq_lens[request])):
        block = batch.block_table[request, position // size].to(torch.int64)
        k, v = load(batch.cache, block[None], batch.fmt)
        keys.append(k[position % size])
        values.append(v[position % size])
    turn = torch.eye(batch.fmt.head_size, dtype=torch.float64)
    if batch.fmt.preset.key.bits != 32:
        turn = rotation(batch.fmt.head_size)
    return torch.stack(keys) @ turn, torch.stack(values) @ turn


def attend_slowly(
    batch: Batch,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What attention over the decoded cache is, float64 ``[T, Hq, d]``."""
    tokens, heads, head_size = batch.query.shape
    group = heads // batch.cache.shape[1]
    out = torch.zeros(tokens, heads, head_size, dtype=torch.float64)
    for request, length in enumerate(batch.seq_lens.tolist()):
        start, end = batch.query_start_loc[request : request + 2].tolist()
        if end == start or length == 0:
            continue
        keys, values = decoded(batch, request)
        for row in range(start, end):
            position = length - (end - row)
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                k, v = keys[first : position + 1, head // group], values[first : position + 1, head // group]
                scores = (k * batch.query[row, head]).sum(-1) * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                logits = scores if sinks is None else torch.cat([scores, sinks[head].double()[None]])
                weights = torch.softmax(logits, 0)[: len(scores)]
                out[row, head] = (weights[:, None] * v).sum(0)
    return out


def spread(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Positive definite matrices ``[..., d, d]`` whose axes differ by up to 10,000 times in energy."""
    vectors = torch.linalg.qr(torch.randn(*shape, shape[-1], generator=rng, dtype=torch.float64))[0]
    values = (torch.rand(*shape, generator=rng, dtype=torch.float64) * math.log(1e4)).exp()
    return vectors @ (values[..., None] * vectors.mT)


def random_basis(rng: torch.Generator, heads: int, d: int, mean: float = 30.0, buckets: int = 1, bucket: int = 32) -> KeyBasis:
    """A basis fitted to random keys and queries, with means of that size. Those of buckets and that of first tokens are a few a
    dim apart: logits differ by as much, beyond which rounding of queries would be all that a comparison sees.
    """
    transform = balanced_transform(spread(rng, heads, d), spread(rng, heads, d))
    first = torch.randn(heads, 1, d, generator=rng) * mean
    means = torch.cat([first, first + 2 * torch.randn(heads, buckets - 1, d, generator=rng)], 1)
    return key_basis(transform, means, first[:, 0] + 4 * torch.randn(heads, d, generator=rng), bucket=bucket)


def around_means(noise: torch.Tensor, basis: KeyBasis, sinks: int = 1) -> torch.Tensor:
    """Keys of one sequence ``[T, Hk, d]`` around the means of their positions, the first ``sinks`` around the sinks' mean."""
    position = torch.arange(len(noise), device=noise.device)
    means = of_bucket(basis.means, basis.bucket_of(position, len(noise)), noise).expand_as(noise).clone()
    means[:sinks] = basis.sink_mean.to(noise)
    return noise + means


def make_batch(
    fmt: PageFormat,
    lengths: list[int],
    query_lengths: list[int],
    kv_heads: int,
    group: int,
    block_size: int,
    seed: int,
    poison: int = 0xFF,
    device: str = "cpu",
    basis: KeyBasis | None = None,
) -> Batch:
    """Random requests, stored through random block tables into a pool whose every other byte is ``poison``.

    basis: keys lie around the means of their positions, those of first tokens around the sinks', and are stored under it.

    The pool is a padded view with a storage offset, so that recomputed strides show.
    """
    from vllm_turboquant.kernels.reference import store

    g = torch.Generator().manual_seed(seed)
    per_request = [math.ceil(length / block_size) for length in lengths]
    total = sum(per_request) + 3
    width = max([*per_request, 1]) + 2
    slot = fmt.slot_bytes
    head_stride, offset = block_size * slot + 32, 48
    block_stride = kv_heads * head_stride + 64
    pool = torch.full((offset + total * block_stride,), poison, dtype=torch.uint8, device=device)
    cache = pool.as_strided((total, kv_heads, block_size, slot), (block_stride, head_stride, slot, 1), offset)
    order = torch.randperm(total, generator=g)[: sum(per_request)].to(torch.int32)
    table = torch.full((len(lengths), width), -1 if poison else 0, dtype=torch.int32)
    keys, values, taken = [], [], 0
    for request, (length, blocks) in enumerate(zip(lengths, per_request, strict=True)):
        table[request, :blocks] = order[taken : taken + blocks]
        taken += blocks
        k, v = (torch.randn(length, kv_heads, fmt.head_size, generator=g, dtype=torch.float64) for _ in range(2))
        position = torch.arange(length)
        slots = table[request, position // block_size].to(torch.int64) * block_size + position % block_size
        if basis is not None:
            k = around_means(k, basis)
        k, v = k.to(device), v.to(device)
        store(k, v, cache, slots.to(device), fmt, basis, position.to(device))
        keys.append(k)
        values.append(v)
    starts = torch.tensor([0, *torch.tensor(query_lengths).cumsum(0).tolist()], dtype=torch.int32)
    query = torch.randn(int(starts[-1]), kv_heads * group, fmt.head_size, generator=g, dtype=torch.float64)
    lengths_tensor = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Batch(fmt, cache, table.to(device), lengths_tensor, starts.to(device), query.to(device), keys, values)
