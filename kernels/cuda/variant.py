"""Compile-time options of the CUDA kernels, all from ``kernels.format`` and ``kernels.codebook``; asks no device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Protocol

from ..format import PageFormat
from .macros import PANEL, page_macros

HEAD_SIZES = (64, 128, 256)
BITS = ((4, 4), (4, 3), (3, 3), (2, 2))
BLOCK_SIZES = (16, 32, 64)
MAX_QUERY_LEN = 8
MAX_GROUP = 16
# In the order in which they are joined.
SOURCES = (
    *("ptx", "common", "params", "codes", "hadamard", "rotate", "work"),
    *("ring", "merge", "score", "attend", "queries", "decode"),
)


class Program(Protocol):
    """What NVRTC and the driver are given: sources in order, their one kernel's name, every ``-D``, the shape of a CTA."""

    sources: ClassVar[tuple[str, ...]]
    entry: ClassVar[str]

    @property
    def threads(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...

    def macros(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Tuning:
    """``warps`` a CTA, ``stages`` of two units in each warp's ring, CTAs a multiprocessor, bulk copies (sm_90 and later)."""

    warps: int
    stages: int
    ctas: int
    bulk: bool


def padded_rows(group: int, max_query_len: int) -> int:
    """Query rows of a KV head that one CTA holds: a power of two, at most 16."""
    return min(16, 1 << (group * max_query_len - 1).bit_length())


def mean_rows(buckets: int) -> int:
    """Rows that hold a `KeyBasis`'s means, one a bucket: whole MMA tiles of 16. It is compiled for as many buckets, or for 1."""
    return 16 * -(-buckets // 16)


def record_bytes(head_size: int, buckets: int) -> int:
    """Of a query row as turn.cu leaves it."""
    return 2 * head_size + 16 + 4 * mean_rows(buckets)


def padded_buckets(buckets: int) -> int:
    return 1 if buckets == 1 else mean_rows(buckets)


def supported_pages(fmt: PageFormat, block_size: int) -> bool:
    """Whether the CUDA kernels read pages of this format and of ``block_size`` tokens."""
    key, value = fmt.preset.key, fmt.preset.value
    return (
        fmt.head_size in HEAD_SIZES
        and fmt.scale_group == min(fmt.head_size, PANEL)
        and (key.bits, value.bits) in BITS
        and not key.sketch
        and block_size in BLOCK_SIZES
    )


def supported(fmt: PageFormat, block_size: int, group: int, max_query_len: int) -> bool:
    """Whether the CUDA decode covers a format and shape: ``group`` query heads a KV head, pages of ``block_size`` tokens."""
    return supported_pages(fmt, block_size) and 1 <= group <= MAX_GROUP and 1 <= max_query_len <= MAX_QUERY_LEN


@dataclass(frozen=True)
class Options:
    """What of a decode is compiled in. ``bf16``: of query and output, fp16 otherwise; ``sink_bits``: of a sink, 0 without;
    ``basis``: buckets of the `KeyBasis` under which keys are stored, a number of `padded_buckets`, 0 without. ``recent``: newest
    tokens are left out, for `recent_attend`.
    """

    fmt: PageFormat
    block_size: int
    bf16: bool
    group: int
    max_query_len: int
    window: bool = False
    soft_cap: bool = False
    sink_bits: int = 0
    basis: int = 0
    recent: bool = False

    @property
    def rows(self) -> int:
        """`padded_rows`."""
        return padded_rows(self.group, self.max_query_len)


@dataclass(frozen=True)
class Variant:
    """One compiled decode: all groups and query lengths of equal `rows` share it."""

    sources: ClassVar[tuple[str, ...]] = SOURCES
    entry: ClassVar[str] = "turboquant_decode"

    options: Options
    tuning: Tuning

    @property
    def mma_rows(self) -> int:
        """Rows that a CTA really holds: large heads leave registers for 8."""
        return min(self.options.rows, 8) if self.options.fmt.head_size == 256 else self.options.rows

    @property
    def threads(self) -> int:
        return 32 * self.tuning.warps

    @property
    def shared_bytes(self) -> int:
        t, fmt = self.tuning, self.options.fmt
        d = fmt.head_size
        ring = t.warps * t.stages * 2 * fmt.unit_bytes
        parts = t.warps * min(self.mma_rows, 8) * (d + 2) * 4
        columns = 16 if self.mma_rows > 8 else 8
        gains = 4 * columns * (1 + mean_rows(self.options.basis)) if self.options.basis else 0
        return ring + parts + columns * (2 * d + 8) + gains + t.warps * t.stages * 8 + 16

    def macros(self) -> dict[str, str]:
        """Every ``-D`` of the sources."""
        o, t = self.options, self.tuning
        values: dict[str, int | str] = {
            "ROWS": self.mma_rows,
            "WARPS": t.warps,
            "STAGES": t.stages,
            "MIN_CTAS": t.ctas,
            "MIN_UNITS": 8,
            "BULK": int(t.bulk),
            "INPUT_BF16": int(o.bf16),
            "MULTI": int(o.max_query_len > 1 or o.window),
            "WINDOW": int(o.window),
            "SOFT_CAP": int(o.soft_cap),
            "SINK_BITS": o.sink_bits,
            "KEY_BASIS": int(o.basis > 0),
            "BUCKETED": int(o.basis > 1),
            "MEAN_ROWS": mean_rows(o.basis),
            "RECORD_BYTES": record_bytes(o.fmt.head_size, o.basis),
            "RECENT": int(o.recent),
            "SHARED_BYTES": self.shared_bytes,
        }
        return page_macros(o.fmt, o.block_size) | {name: str(value) for name, value in values.items()}


@cache
def source(*names: str) -> str:
    """The sources joined, each under its own name in the compiler's messages."""
    folder = Path(__file__).parent
    parts = []
    for part in names:
        file = folder / f"{part}.{'cu' if part in ('decode', 'context', 'store', 'turn') else 'cuh'}"
        parts.append(f'#line 1 "{file.name}"\n{file.read_text()}')
    return "\n".join(parts)
