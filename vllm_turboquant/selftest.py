"""A small random batch through the kernels of this machine, against plain attention in float64 over what the pages decode to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .kernels import reference
from .kernels.format import PageFormat, page_format

_HEADS, _KV_HEADS, _HEAD_SIZE, _BLOCK = 8, 2, 128, 16
_LENGTHS = (1, 37, 130)  # tokens of each request, one of them a query
_DTYPE = torch.bfloat16
# Root mean square of what codes lose of Gaussian vectors, relative: the two-bit levels' 0.34 is the most; garbage has 1 and more.
_CODES = 0.5
_EXACT = 1e-6  # float64 along another path
_ROUNDED = 3e-2  # outputs below 2 in bf16, products of bf16 and tf32


class SelfTestError(Exception):
    """What a kernel got wrong: half a sentence."""


@dataclass(frozen=True)
class Batch:
    """Pages and the last token of each request, on one device."""

    fmt: PageFormat
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    query: torch.Tensor
    expected: torch.Tensor  # float64 on the CPU

    @property
    def scale(self) -> float:
        return float(_HEAD_SIZE**-0.5)


def stored(preset: str, device: torch.device, store: Callable[..., None], dtype: torch.dtype = _DTYPE) -> Batch:
    """Random tokens that ``store`` put into pages. SelfTestError where they cannot be read back."""
    rng = torch.Generator().manual_seed(0)
    tokens = sum(_LENGTHS)
    key, value = (torch.randn(tokens, _KV_HEADS, _HEAD_SIZE, generator=rng).to(dtype) for _ in range(2))
    query = torch.randn(len(_LENGTHS), _HEADS, _HEAD_SIZE, generator=rng).to(dtype)
    counts = [-(-length // _BLOCK) for length in _LENGTHS]
    order = torch.randperm(sum(counts), generator=rng)
    table = torch.zeros(len(_LENGTHS), max(counts), dtype=torch.int32)
    slots = []
    for request, (length, own) in enumerate(zip(_LENGTHS, order.split(counts), strict=True)):
        table[request, : len(own)] = own
        positions = torch.arange(length)
        slots.append(own[positions // _BLOCK] * _BLOCK + positions % _BLOCK)
    fmt = page_format(preset, _HEAD_SIZE)
    cache = torch.zeros(sum(counts), _KV_HEADS, _BLOCK, fmt.slot_bytes, dtype=torch.uint8, device=device)
    store(key.to(device), value.to(device), cache, torch.cat(slots).to(device), fmt)
    expected = []
    for request, (k, v) in enumerate(zip(key.split(_LENGTHS), value.split(_LENGTHS), strict=True)):
        length = _LENGTHS[request]
        keys, values = reference.load_vectors(cache.cpu(), table[request, : counts[request]].long(), fmt)
        for name, raw, found in (("keys", k.double(), keys[:length]), ("values", v.double(), values[:length])):
            lost = float((found - raw).norm() / raw.norm())
            if not lost < _CODES:
                raise SelfTestError(f"{preset} reads stored {name} back with an error of {lost:.0%}")
        expected.append(_attention(query[request].double(), keys[:length], values[:length]))
    return Batch(
        fmt,
        cache,
        block_table=table.to(device),
        seq_lens=torch.tensor(_LENGTHS, dtype=torch.int32, device=device),
        query_start_loc=torch.arange(len(_LENGTHS) + 1, dtype=torch.int32, device=device),
        query=query.to(device),
        expected=torch.stack(expected),
    )


def _attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One token's query ``[Hq, d]`` over keys and values ``[L, Hk, d]``, all float64."""
    group = _HEADS // _KV_HEADS
    heads = []
    for head in range(_HEADS):
        scores = keys[:, head // group] @ query[head] * _HEAD_SIZE**-0.5
        heads.append(torch.softmax(scores, 0) @ values[:, head // group])
    return torch.stack(heads)


def _compare(what: str, out: torch.Tensor, batch: Batch, bound: float) -> None:
    error = float((out.cpu().double() - batch.expected).abs().max())
    if not error < bound:
        raise SelfTestError(f"{what} is off by {error:.3g}, allowed are {bound:g}")


def check_reference(preset: str) -> None:
    """The CPU path. Raises SelfTestError."""
    batch = stored(preset, torch.device("cpu"), reference.store)
    out = reference.attend(
        batch.query, batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.fmt, batch.scale
    )
    _compare(f"attention to {preset} pages", out, batch, _EXACT)


def check_portable(preset: str, device: torch.device) -> None:
    """Triton's store and decode. Raises SelfTestError."""
    from .kernels.combine import plan_decode
    from .kernels.decode import decode
    from .kernels.store import store

    batch = stored(preset, device, store)
    floats = plan_decode(len(_LENGTHS), len(_LENGTHS), _HEADS, _KV_HEADS, _HEAD_SIZE, 1).floats
    _compare(f"portable decode of {preset}", _decoded(decode, batch, floats), batch, _ROUNDED)


def check_cuda(preset: str, device: torch.device) -> bool:
    """The CUDA store and decode; False where there are none for this preset or machine. Raises SelfTestError."""
    from .kernels.cuda import launch, store

    fmt = page_format(preset, _HEAD_SIZE)
    if not launch.prepare(device, fmt, _BLOCK, _DTYPE, _HEADS // _KV_HEADS, 1) or not store.prepare(device, fmt, _BLOCK, _DTYPE):
        return False
    batch = stored(preset, device, store.store)
    floats = launch.scratch_floats(_HEADS // _KV_HEADS, _HEAD_SIZE, 1, device)
    _compare(f"CUDA decode of {preset}", _decoded(launch.decode, batch, floats), batch, _ROUNDED)
    return True


def _decoded(decode: Callable[..., None], batch: Batch, floats: int) -> torch.Tensor:
    out = torch.full_like(batch.query, float("nan"))
    scratch = torch.full((floats,), float("nan"), device=batch.query.device)
    where = batch.block_table, batch.seq_lens, batch.query_start_loc
    decode(batch.query, batch.cache, *where, out, scratch, batch.fmt, batch.scale, 1)
    return out
