"""The layout of ``kernels.format`` as small device tables, so that one Triton source serves every preset and head size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .codebook import LEVELS
from .format import UNIT_TOKENS, PageFormat, Plane, VectorCodec


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# What a Triton kernel needs to know of a plane, as compile-time integers: words a token, dims and bytes a word, where the
# plane's word offsets ([16, words]) and shifts ([fields, 2, dims]) start in the side's table, and mask and place of its
# one or two fields (a mask of 0: no such field).
PlaneLayout = tuple[int, int, int, int, int, int, int, int, int]
NO_PLANE: PlaneLayout = (0, 1, 1, 0, 0, 0, 0, 0, 0)
MAX_PLANES = 3


@dataclass(frozen=True)
class SideTables:
    """One side (keys or values) of a format, for kernels.

    ``table``: int32, all offsets and shifts; ``planes``: where they are in it, padded to three. ``scalars``: int32 ``[16,
    groups]`` byte offsets of the fp16 scales, ``norms`` those of the sketch norms. ``levels``: fp32 ``[2 ** bits]``, the
    value of each code.
    """

    codec: VectorCodec
    table: torch.Tensor
    planes: tuple[PlaneLayout, PlaneLayout, PlaneLayout]
    scalars: torch.Tensor
    norms: torch.Tensor
    levels: torch.Tensor


def _plane(plane: Plane, table: list[int]) -> PlaneLayout:
    words = range(0, plane.token_bytes, plane.word_bytes)
    offsets = len(table)
    table.extend(plane.byte_offset(token, byte) for token in range(UNIT_TOKENS) for byte in words)
    shifts = len(table)
    for field in plane.fields:
        table.extend(field.shifts[0] + field.shifts[1])
    masks = [(field.mask, field.place) for field in plane.fields]
    if not masks:  # whole numbers: bytes of a word, or one word a dim
        table.extend(tuple(8 * n for n in range(plane.dims)) * 2)
        masks = [(0xFF if plane.bits == 8 else -1, 0)]
    (mask0, place0), (mask1, place1) = (*masks, (0, 0))[:2]
    return len(words), plane.dims, plane.word_bytes, offsets, shifts, mask0, place0, mask1, place1


@cache
def side_tables(fmt: PageFormat, kind: str, device: torch.device) -> SideTables:
    """Tables of ``kind`` ("key" or "value") on ``device``; built once a format, before any graph is captured."""
    codec, planes = fmt.sides[kind]
    table: list[int] = []
    layouts = [_plane(plane, table) for plane in planes]
    first, second, third = (layouts + [NO_PLANE] * MAX_PLANES)[:MAX_PLANES]

    def scalar_offsets(name: str) -> torch.Tensor:
        rows = [[0] * fmt.groups] * UNIT_TOKENS
        if name in fmt.scalars:
            index = fmt.scalars.index(name)
            rows = [[fmt.scalar_offset(token, g, index) for g in range(fmt.groups)] for token in range(UNIT_TOKENS)]
        return torch.tensor(rows, dtype=torch.int32, device=device)

    levels = [*LEVELS[codec.bits], *(-level for level in LEVELS[codec.bits])] if codec.scaled else [0.0, 0.0]
    return SideTables(
        codec,
        torch.tensor(table, dtype=torch.int32, device=device),
        (first, second, third),
        scalar_offsets(kind),
        scalar_offsets("sketch_norm" if codec.sketch else kind),
        torch.tensor(levels, dtype=torch.float32, device=device),
    )


def check_pages(cache: torch.Tensor, fmt: PageFormat, kv_heads: int) -> None:
    """Asserts that ``cache`` is uint8 ``[B, kv_heads, N, C]`` of ``fmt``, 16-byte aligned, ``[N, C]`` contiguous."""
    _, heads, block_size, slot = cache.shape
    assert cache.dtype == torch.uint8 and slot == fmt.slot_bytes and heads == kv_heads, (cache.shape, cache.dtype)
    assert cache.stride(3) == 1 and cache.stride(2) == slot and block_size % UNIT_TOKENS == 0, cache.stride()
    assert cache.data_ptr() % 16 == 0 and cache.stride(0) % 16 == 0 and cache.stride(1) % 16 == 0, cache.stride()


def check_context(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    first: torch.Tensor,
    start_loc: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fmt: PageFormat,
) -> None:
    """Asserts what every context loader needs of its arguments: pages as `check_pages` does, ``key`` and ``value`` alike,
    ``[rows, H, d]``, last dims contiguous, ``first`` and ``start_loc`` contiguous."""
    heads, d = key.shape[1:]
    check_pages(cache, fmt, heads)
    assert key.stride() == value.stride() and key.stride(2) == 1 and key.shape == value.shape and d == fmt.head_size
    assert block_table.stride(1) == 1 and first.is_contiguous() and start_loc.is_contiguous()


def page_arguments(cache: torch.Tensor, fmt: PageFormat) -> dict[str, object]:
    """What every Triton kernel over pages is told of them, by the names of its parameters."""
    keys, values = (side_tables(fmt, kind, cache.device) for kind in ("key", "value"))
    return {
        "cache": cache,
        "cache_stride_block": cache.stride(0),
        "cache_stride_head": cache.stride(1),
        "key_table": keys.table,
        "key_scalars": keys.scalars,
        "key_norms": keys.norms,
        "value_table": values.table,
        "value_scalars": values.scalars,
        "KEY_BITS": keys.codec.bits,
        "KEY_SKETCH": keys.codec.sketch,
        "VALUE_BITS": values.codec.bits,
        **{f"K{i}": plane for i, plane in enumerate(keys.planes)},
        **{f"V{i}": plane for i, plane in enumerate(values.planes)},
        "D": fmt.head_size,
        "GROUP": fmt.scale_group,
        "BLOCK_SIZE": cache.shape[2],
        "UNIT_BYTES": fmt.unit_bytes,
    }


def level_arguments(cache: torch.Tensor, fmt: PageFormat) -> dict[str, object]:
    """The values of codes, for kernels that look them up."""
    return {f"{kind}_levels": side_tables(fmt, kind, cache.device).levels for kind in ("key", "value")}
