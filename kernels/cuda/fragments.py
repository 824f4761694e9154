"""A key basis as the CUDA kernels read it: matrices in the order of MMA operands, made once a basis.

A KV head's record is 16 x 16 tiles of its matrix in fp16, 512 bytes each: lane (g, t) finds its A operand of an m16n8k16 MMA,
rows g and g + 8 and slots 2t, 2t + 1, 2t + 8 and 2t + 9, in 16 consecutive bytes. Slots stand for dims in the order in which
a lane holds a row of keys (codes.cuh); rows in the order in which a lane's results are consecutive dims.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from weakref import WeakKeyDictionary

import torch

from ..basis import KeyBasis
from ..format import UNIT_TOKENS
from .variant import mean_rows


def _kept(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``make``'s result is made once and kept as long as its basis lives: captured graphs hold the address."""
    made: WeakKeyDictionary[KeyBasis, dict[tuple[int, ...], torch.Tensor]] = WeakKeyDictionary()

    @wraps(make)
    def once(basis: KeyBasis, *options: int) -> torch.Tensor:
        mine = made.setdefault(basis, {})
        if options not in mine:
            mine[options] = make(basis, *options)
        return mine[options]

    return once


@_kept
def query_fragments(basis: KeyBasis) -> torch.Tensor:
    """What turns queries, and the means that they meet unturned: uint8 ``[Hk, 2 d^2 + 16 + 4 R d]``, on the basis's device.

    A head's record: ``inverse^T / 2^e`` in fp16; ``2^e`` and ``2^(f - e)`` in fp32 and padding; R = `mean_rows` rows of means,
    ``/ 2^f`` in fp16, then what that rounds off, again in fp16: how far each bucket's mean is from the first's; in place of
    its own, which is 0, the second mean's. The matrix's rows are shorter than 2^11, so that queries of components below 1 turn
    into numbers below 2^11 sqrt(d) <= 2^15, which fp16 holds with all its bits down to 2^-14: no bound of the turned query
    itself is needed.
    """
    matrix = basis.inverse.mT
    heads, d, _ = matrix.shape
    power = torch.frexp(matrix.norm(dim=-1).amax(-1)).exponent - 11
    rows = [16 * tile + 2 * (row & 7) + (row >> 3) for tile in range(d // 16) for row in range(16)]
    means = torch.zeros(heads, mean_rows(basis.buckets), d, device=matrix.device)
    means[:, : basis.buckets] = torch.cat([basis.sink_mean[:, None], basis.means[:, 1:]], 1) - basis.means[:, :1]
    mean_power = torch.frexp(means.abs().amax((-2, -1))).exponent - 15
    pieces = [_tiles(matrix, power, rows, 1), _factors(power, mean_power - power)]
    return torch.cat([*pieces, _tiles(means, mean_power, list(range(means.shape[1])), 2)], -1)


@_kept
def key_fragments(basis: KeyBasis, parts: int) -> torch.Tensor:
    """What turns decoded keys back: uint8 ``[Hk, 2 parts d^2 + 16 + 4 (1 + B) d]``, on the basis's device.

    A head's record: ``inverse / 2^e`` in fp16; with 2 parts what that rounds off, again in fp16; ``2^e`` in fp32 and padding;
    then in fp32 how far the second mean is from the first bucket's, and the buckets' means. Entries are below 2^15.
    """
    power = torch.frexp(basis.inverse.abs().amax((-2, -1))).exponent - 15
    d = basis.inverse.shape[-1]
    rows = [64 * (tile >> 2) + 8 * (row & 7) + 2 * (tile & 3) + (row >> 3) for tile in range(d // 16) for row in range(16)]
    means = torch.cat([(basis.sink_mean - basis.means[:, 0])[:, None], basis.means], 1)
    pieces = [_tiles(basis.inverse, power, rows, parts), _factors(power, power)]
    return torch.cat([*pieces, means.flatten(1).view(torch.uint8)], -1)


def _factors(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Powers of two ``2 ** first`` and ``2 ** second`` in fp32, and padding: uint8 ``[Hk, 16]``."""
    powers = torch.stack([first, second, first, first], -1)
    return torch.ldexp(torch.ones_like(powers, dtype=torch.float32), powers).view(torch.uint8)


def bucket_arguments(basis: KeyBasis | None) -> tuple[int, int]:
    """What the kernels are told of a basis's buckets: 2^31 over the units of 16 tokens in one, rounded up; how many there are."""
    return (0, 1) if basis is None else (-(-(2**31) // (basis.bucket // UNIT_TOKENS)), basis.buckets)


def slot_dims(d: int) -> list[int]:
    """The dim of each slot, 16 slots a step: of lane t a panel's octets of dims in order, two steps an octet."""
    run = 32 if d >= 128 else 16
    octets = run // 8
    dims = []
    for step in range(d // 16):
        panel, octet = divmod(step // 2, octets)
        for slot in range(16):
            t, part = slot >> 1 & 3, slot & 1 | (slot >> 3) << 1
            dims.append(128 * panel + t * run + 8 * octet + 4 * (step & 1) + part)
    return dims


def _tiles(matrix: torch.Tensor, power: torch.Tensor, rows: list[int], parts: int) -> torch.Tensor:
    """Tiles of fp32 matrices ``[Hk, n, d]`` over ``2 ** power``: uint8 ``[Hk, 2 parts n d]``."""
    heads, n, d = matrix.shape
    rest = torch.ldexp(matrix, -power[:, None, None])[:, rows][..., slot_dims(d)]
    pieces = []
    for _ in range(parts):
        part = rest.to(torch.float16)
        rest = rest - part.to(torch.float32)
        # [head, tile, row's half, g, step, slot's half, t, pair]
        whole = part.view(heads, n // 16, 2, 8, d // 16, 2, 4, 2).permute(0, 1, 4, 3, 6, 5, 2, 7).contiguous()
        pieces.append(whole.view(heads, -1).view(torch.uint8))
    return torch.cat(pieces, -1)
