"""What the kernels beside the decode are compiled for: the store, the turn of queries, the context loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..format import UNIT_TOKENS, PageFormat
from .macros import encode_macros, page_macros
from .variant import mean_rows, record_bytes


@dataclass(frozen=True)
class TurnVariant:
    """One compiled turn of queries. ``bf16``: of queries, fp16 otherwise; ``buckets``: of the `KeyBasis`, of `padded_buckets`;
    ``few``: for less than a CTA a multiprocessor, where latency counts and not how many CTAs fit one.
    """

    sources: ClassVar[tuple[str, ...]] = ("ptx", "common", "codes", "hadamard", "rotate", "turn")
    entry: ClassVar[str] = "turboquant_turn"
    columns: ClassVar[int] = 16  # query rows of a CTA

    fmt: PageFormat
    bf16: bool
    buckets: int
    few: bool

    @property
    def threads(self) -> int:
        return 32 * 12  # warps, for 8 tiles of a matrix of 128 rows and the means'

    @property
    def _roomy(self) -> bool:
        return self.few or self.fmt.head_size == 256

    @property
    def shared_bytes(self) -> int:
        return self.columns * (2 * self.fmt.head_size + 4)

    def macros(self) -> dict[str, str]:
        """Every ``-D`` of the sources."""
        values: dict[str, int | str] = {
            "WARPS": self.threads // 32,
            "INPUT_BF16": int(self.bf16),
            "KEY_BASIS": 1,
            "MIN_CTAS": 1 if self._roomy else 2,
            "ROW_MMAS": min(self.fmt.head_size // 16, 8 if self._roomy else 4),  # whose operands are loaded at once
            "MEAN_ROWS": mean_rows(self.buckets),
            "RECORD_BYTES": record_bytes(self.fmt.head_size, self.buckets),
            "SHARED_BYTES": self.shared_bytes,
        }
        return page_macros(self.fmt, UNIT_TOKENS) | {name: str(value) for name, value in values.items()}


@dataclass(frozen=True)
class ContextVariant:
    """One compiled context loader. ``bf16``: of the workspaces, fp16 otherwise; ``basis``: keys are under a `KeyBasis`."""

    sources: ClassVar[tuple[str, ...]] = ("ptx", "common", "codes", "unrotate", "basis", "context")
    entry: ClassVar[str] = "turboquant_context"
    warps: ClassVar[int] = 4  # half of them for keys

    fmt: PageFormat
    block_size: int
    bf16: bool
    basis: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        return 0

    @property
    def matrix_parts(self) -> int:
        """fp16 parts of a basis's matrix: one errs as 11 bits of a key do, far below a bf16 output's rounding."""
        return 1 if self.bf16 else 2

    def macros(self) -> dict[str, str]:
        """Every ``-D`` of the sources."""
        values: dict[str, int | str] = {
            "WARPS": self.warps,
            "MIN_CTAS": (4 if self.fmt.head_size == 256 else 5) - self.basis,  # what their registers allow
            "OUTPUT_BF16": int(self.bf16),
            "KEY_BASIS": int(self.basis),
            "MATRIX_PARTS": self.matrix_parts,
        }
        return page_macros(self.fmt, self.block_size) | {name: str(value) for name, value in values.items()}


@dataclass(frozen=True)
class StoreVariant:
    """One compiled store. ``bf16``: of keys and values, fp16 otherwise; ``basis``: keys are stored under a `KeyBasis`."""

    sources: ClassVar[tuple[str, ...]] = ("ptx", "common", "hadamard", "encode", "store")
    entry: ClassVar[str] = "turboquant_store"
    warps: ClassVar[int] = 8  # one a token, and as many tokens as an MMA has columns

    fmt: PageFormat
    block_size: int
    bf16: bool
    basis: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        return self.warps * (4 * (self.fmt.head_size + 4) + self.fmt.head_size)

    def macros(self) -> dict[str, str]:
        """Every ``-D`` of the sources."""
        values: dict[str, int | str] = {
            "WARPS": self.warps,
            "MIN_CTAS": 1 if self.fmt.head_size == 256 else 2,  # what their registers allow
            "INPUT_BF16": int(self.bf16),
            "KEY_BASIS": int(self.basis),
            "AHEAD": 4,
            "SHARED_BYTES": self.shared_bytes,
            # bf16 reaches as far as fp32: brought down by an exact power of two, sums of its largest numbers stay finite.
            "PRESCALE": "0x1p-40f" if self.bf16 else "1.0f",
        }
        return page_macros(self.fmt, self.block_size) | encode_macros(self.fmt) | {k: str(v) for k, v in values.items()}
