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
from .variant import PANEL


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
    """What turns queries: uint8 ``[Hk, 2 d^2 + 16 + 4 groups d]``, on the basis's device.

    A head's record: ``inverse^T / 2^e`` in fp16; ``2^e`` in fp32 and padding; `second_means` in fp32. The matrix's rows are
    shorter than 2^11, so that queries of components below 1 turn into numbers below 2^11 sqrt(d) <= 2^15, which fp16 holds
    with all its bits down to 2^-14: no bound of the turned query itself is needed.
    """
    matrix = basis.inverse.mT
    power = torch.frexp(matrix.norm(dim=-1).amax(-1)).exponent - 11
    d = matrix.shape[-1]
    rows = [16 * tile + 2 * (row & 7) + (row >> 3) for tile in range(d // 16) for row in range(16)]
    return torch.cat([_records(matrix, power, rows, 1), second_means(basis)], -1)


@_kept
def key_fragments(basis: KeyBasis, parts: int) -> torch.Tensor:
    """What turns decoded keys back: uint8 ``[Hk, 2 parts d^2 + 16 + 4 (1 + groups) d]``, on the basis's device.

    A head's record: ``inverse / 2^e`` in fp16; with 2 parts what that rounds off, again in fp16; ``2^e`` in fp32 and padding;
    the mean and `second_means` in fp32. Entries are below 2^15.
    """
    power = torch.frexp(basis.inverse.abs().amax((-2, -1))).exponent - 15
    d = basis.inverse.shape[-1]
    rows = [64 * (tile >> 2) + 8 * (row & 7) + 2 * (tile & 3) + (row >> 3) for tile in range(d // 16) for row in range(16)]
    return torch.cat(
        [_records(basis.inverse, power, rows, parts), basis.means[:, 0].contiguous().view(torch.uint8), second_means(basis)], -1
    )


def second_means(basis: KeyBasis) -> torch.Tensor:
    """By how much a key is farther on where a scale group is relative to the second mean: fp32 ``[groups, d]`` a head, as bytes.

    In the model's basis: ``inverse`` times the group's part of the offset, so that a query needs no turn to meet it.
    """
    heads, d = basis.sink_mean.shape
    parts = (basis.inverse.double() * basis.offset.double()[:, None]).unflatten(-1, (-1, min(d, PANEL))).sum(-1)
    return parts.mT.to(torch.float32).contiguous().view(heads, -1).view(torch.uint8)


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


def _records(matrix: torch.Tensor, power: torch.Tensor, rows: list[int], parts: int) -> torch.Tensor:
    """Records of fp32 matrices ``[Hk, d, d]`` over ``2 ** power``, up to the padding: ``[Hk, 2 parts d^2 + 16]``."""
    heads, d, _ = matrix.shape
    rest = torch.ldexp(matrix, -power[:, None, None])[:, rows][..., slot_dims(d)]
    pieces = []
    for _ in range(parts):
        part = rest.to(torch.float16)
        rest = rest - part.to(torch.float32)
        # [head, tile, row's half, g, step, slot's half, t, pair]
        whole = part.view(heads, d // 16, 2, 8, d // 16, 2, 4, 2).permute(0, 1, 4, 3, 6, 5, 2, 7).contiguous()
        pieces.append(whole.view(heads, -1).view(torch.uint8))
    factor = torch.zeros(heads, 4, dtype=torch.float32, device=matrix.device)
    factor[:, 0] = torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)
    return torch.cat([*pieces, factor.view(torch.uint8)], -1)
