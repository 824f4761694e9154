"""Milliseconds to store new tokens' keys and values, without and with a calibrated key basis.

    python -m tests.bench.store

Appends a row a shape to results/store_<card>.jsonl. A time is the median of replays of a CUDA graph with one call, by
triton's do_bench. `floor_ms` is the time the card's memory needs to read bf16 keys and values and write their codes once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from vllm_turboquant.kernels.cuda import store
from vllm_turboquant.kernels.format import DEFAULT_PRESET, page_format

from .rows import append_row, floor_ms
from .shapes import calibrated_basis, milliseconds

PAGE = 16
SERVED = 32768


@dataclass(frozen=True)
class Shape:
    """``tokens`` new ones of one layer."""

    tokens: int
    kv_heads: int = 8
    head_size: int = 128
    preset: str = DEFAULT_PRESET


SHAPES = (
    *(Shape(tokens) for tokens in (1, 48, 2048, 8192)),
    *(Shape(8192, head_size=d) for d in (64, 256)),
    *(Shape(8192, preset=preset) for preset in ("turboquant-k4v3", "turboquant-k3v3", "turboquant-k2v2")),
)


def measure(shape: Shape) -> dict[str, object]:
    """One row."""
    fmt = page_format(shape.preset, shape.head_size)
    key, value = (
        torch.randn(shape.tokens, shape.kv_heads, shape.head_size, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    blocks = -(-shape.tokens // PAGE)
    cache = torch.zeros(blocks, shape.kv_heads, PAGE, fmt.slot_bytes, dtype=torch.uint8, device="cuda")
    slots = torch.randperm(blocks * PAGE, device="cuda")[: shape.tokens]
    positions = torch.arange(shape.tokens, device="cuda")
    times = []
    for basis in (None, calibrated_basis(shape.kv_heads, shape.head_size, SERVED)):
        assert store.prepare(cache.device, fmt, PAGE, key.dtype, basis), "the CUDA store is not usable here"
        arguments = key, value, cache, slots, fmt, basis, positions
        times.append(milliseconds(lambda arguments=arguments: store.store(*arguments)))  # type: ignore[misc]
    moved = fmt.slot_bytes + 2 * shape.head_size * torch.bfloat16.itemsize
    return {
        "tokens": shape.tokens,
        "Hk": shape.kv_heads,
        "D": shape.head_size,
        "preset": shape.preset,
        "ours_ms": round(times[0], 4),
        "calibrated_ms": round(times[1], 4),
        "floor_ms": floor_ms(shape.tokens * shape.kv_heads * moved),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    torch.manual_seed(0)
    for shape in SHAPES:
        print(append_row("store", measure(shape)), flush=True)


if __name__ == "__main__":
    main()
