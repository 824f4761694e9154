"""Codes to page bytes and back, driven by the tables of ``kernels.format``; every function is vectorised torch."""

from __future__ import annotations

from functools import cache

import torch

from .format import SCALE_BYTES, UNIT_TOKENS, PageFormat, Plane

_WORD_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_RUN_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _shifts(shifts: tuple[tuple[int, ...], tuple[int, ...]]) -> torch.Tensor:
    return torch.tensor(shifts, dtype=torch.int32, device="cpu")


@cache
def unit_table(fmt: PageFormat, device: str = "cpu") -> torch.Tensor:
    """``token_bytes_table`` as int64 ``[16, C]``."""
    return torch.tensor(fmt.token_bytes_table, dtype=torch.int64, device=device)


@cache
def _read_table(fmt: PageFormat, device: str) -> tuple[tuple[int, torch.Tensor], ...]:
    """One gather per plane and one for the scalars: bytes that stay together, and int64 ``[16 * n]`` indices of such runs."""
    widths = [plane.token_bytes for plane in fmt.planes] + [SCALE_BYTES * len(fmt.scalars) * fmt.groups]
    tables = []
    for columns in unit_table(fmt).split(widths, dim=1):
        for run in (8, 4, 2, 1):
            if columns.shape[1] % run == 0:
                runs = columns.unflatten(1, (-1, run))
                if not (runs[..., 0] % run).any() and torch.equal(runs, runs[..., :1] + torch.arange(run)):
                    tables.append((run, (runs[..., 0] // run).flatten().to(device)))
                    break
    return tuple(tables)


def pack_plane(plane: Plane, codes: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """Packs one plane's share of ``codes``.

    codes: int ``[..., d]``, not negative. odd: int64 ``[...]``, each token's index in its unit modulo 2.
    Returns uint8 ``[..., plane.token_bytes]``, the token's words with dims ascending.
    """
    parts = codes.to(torch.int32).unflatten(-1, (-1, plane.dims))
    words = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=codes.device)
    for field in plane.fields:
        shift = _shifts(field.shifts).to(codes.device)[odd].unsqueeze(-2)
        # Fields do not overlap, so the sum of the shifted parts is their union (it may wrap into the sign bit).
        words += (((parts >> field.place) & field.mask) << shift).sum(-1, dtype=torch.int32)
    raw = words.unsqueeze(-1).view(torch.uint8)[..., : plane.word_bytes]
    return raw.flatten(-2)


def unpack_plane(plane: Plane, raw: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_plane`: uint8 ``[..., token_bytes]`` to int32 codes ``[..., d]`` (other planes' bits 0)."""
    words = raw.contiguous().view(_WORD_DTYPES[plane.word_bytes]).to(torch.int32).unsqueeze(-1)
    codes: torch.Tensor | None = None
    for field in plane.fields:
        shift = _shifts(field.shifts).to(raw.device)[odd].unsqueeze(-2)
        part = (words >> shift) & field.mask
        if field.place:
            part = part << field.place
        codes = part if codes is None else codes | part
    assert codes is not None, "plane holds whole numbers, not codes"
    return codes.flatten(-2)


def unit_view(cache: torch.Tensor, fmt: PageFormat) -> torch.Tensor:
    """``[B, H, N, C]`` uint8 pages as units ``[B, H, N / 16, 16 C]``, sharing memory.

    Needs ``[N, C]`` contiguous per (block, head); block and head strides and the storage offset are the tensor's own.
    """
    blocks, heads, tokens, slot = cache.shape
    assert cache.dtype == torch.uint8 and slot == fmt.slot_bytes, (cache.dtype, slot, fmt.slot_bytes)
    assert tokens % UNIT_TOKENS == 0, f"block size {tokens} is not a multiple of {UNIT_TOKENS}"
    assert cache.stride(3) == 1 and cache.stride(2) == slot, cache.stride()
    return cache.as_strided(
        (blocks, heads, tokens // UNIT_TOKENS, fmt.unit_bytes),
        (cache.stride(0), cache.stride(1), fmt.unit_bytes, 1),
        cache.storage_offset(),
    )


def write_tokens(cache: torch.Tensor, slots: torch.Tensor, payload: torch.Tensor, fmt: PageFormat) -> None:
    """Writes whole tokens; no other byte of the pages is read or written.

    slots: int64 ``[T]``, block * block_size + position, none negative. payload: uint8 ``[T, H, C]`` in the order of
    ``token_bytes_table``.
    """
    units = unit_view(cache, fmt)
    block, position = slots // cache.shape[2], slots % cache.shape[2]
    unit, token = position // UNIT_TOKENS, position % UNIT_TOKENS
    heads = torch.arange(cache.shape[1], device=cache.device)
    table = unit_table(fmt, str(cache.device))
    units[block[:, None, None], heads[None, :, None], unit[:, None, None], table[token][:, None, :]] = payload


def read_tokens(cache: torch.Tensor, blocks: torch.Tensor, fmt: PageFormat) -> list[torch.Tensor]:
    """Every token of ``blocks`` (int64 ``[n]``): one uint8 ``[n * N, H, bytes]`` a plane, then one for all scalars."""
    units = unit_view(cache, fmt)[blocks]  # [n, H, U, 16 C], a copy
    pieces = []
    for run, index in _read_table(fmt, str(cache.device)):
        picked = units.view(_RUN_DTYPES[run])[..., index].unflatten(-1, (UNIT_TOKENS, -1)).view(torch.uint8)
        pieces.append(picked.permute(0, 2, 3, 1, 4).flatten(0, 2))
    return pieces
