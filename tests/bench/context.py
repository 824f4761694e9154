"""Milliseconds to decode older context into a bf16 workspace: this project's CUDA kernel, without and with a calibrated key
basis, and its portable one.

    python -m tests.bench.context                8192 tokens, every head size and preset that both cover

Appends a row a shape to results/context_<card>.jsonl. A time is the median of replays of a CUDA graph with one call, by
triton's do_bench. `floor_ms` is the time the card's memory needs to read the pages and write the workspaces once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_turboquant.kernels.basis import KeyBasis
from vllm_turboquant.kernels.cuda import context
from vllm_turboquant.kernels.format import DEFAULT_PRESET, page_format
from vllm_turboquant.kernels.prefill import load_context

from ..gpu.shadow import cached
from .decode import milliseconds, random_pages
from .rows import append_row, floor_ms
from .shapes import calibrated_basis


@dataclass(frozen=True)
class Shape:
    """``tokens`` of context, shared evenly by ``requests`` ranges that do not begin with a unit."""

    tokens: int = 8192
    requests: int = 1
    kv_heads: int = 8
    head_size: int = 128
    page: int = 16
    preset: str = DEFAULT_PRESET


SHAPES = (
    *(Shape(head_size=d) for d in (64, 128, 256)),
    *(Shape(preset=preset) for preset in ("turboquant-k4v3", "turboquant-k3v3", "turboquant-k2v2")),
    *(Shape(tokens=tokens) for tokens in (512, 2048, 32768)),
    Shape(requests=16),
)
FIRST = 5


def calls(shape: Shape, basis: KeyBasis | None = None) -> tuple[Callable[[], None], Callable[[], None]]:
    """Our launch and the portable one, which write alike: held against the float64 reference and each other first."""
    fmt = page_format(shape.preset, shape.head_size)
    device = torch.device("cuda", torch.cuda.current_device())
    assert context.prepare(device, fmt, shape.page, torch.bfloat16, basis), "the CUDA context loader is not usable here"
    longest = shape.tokens // shape.requests
    width = -(-(FIRST + longest) // shape.page)
    cache = random_pages(shape.requests * width, shape.kv_heads, shape.page, fmt)
    table = torch.randperm(shape.requests * width, device="cuda").to(torch.int32).view(shape.requests, width)
    first = torch.full((shape.requests,), FIRST, dtype=torch.int32, device="cuda")
    starts = torch.arange(shape.requests + 1, dtype=torch.int32, device="cuda") * longest
    size = (longest * shape.requests, shape.kv_heads, shape.head_size)
    ours, portable = ([torch.full(size, float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(2))

    def run_ours() -> None:
        context.load_context(cache, table, first, starts, longest, *ours, fmt, basis)

    def run_portable() -> None:
        load_context(cache, table, first, starts, longest, *portable, fmt, basis)

    run_ours()
    run_portable()
    checked = min(longest, 256)
    for side, expected in enumerate(cached(cache, table[-1], FIRST, FIRST + checked, fmt, basis)):
        got = ours[side][-longest:][:checked].double()
        error = float((got - expected).norm() / expected.norm())
        assert error < 2**-8.5, f"{shape}: relative error {error}"
        apart = float((ours[side].float() - portable[side].float()).norm() / portable[side].float().norm())
        assert apart < 2**-8, f"{shape}: the loaders differ by {apart}"
    return run_ours, run_portable


def measure(shape: Shape) -> dict[str, object]:
    """One row."""
    run_ours, run_portable = calls(shape)
    longest = FIRST + shape.tokens // shape.requests
    run_calibrated, _ = calls(shape, calibrated_basis(shape.kv_heads, shape.head_size, longest))
    stored = page_format(shape.preset, shape.head_size).slot_bytes + 2 * shape.head_size * torch.bfloat16.itemsize
    return {
        "tokens": shape.tokens,
        "requests": shape.requests,
        "Hk": shape.kv_heads,
        "D": shape.head_size,
        "page": shape.page,
        "preset": shape.preset,
        "ours_ms": round(milliseconds(run_ours), 4),
        "calibrated_ms": round(milliseconds(run_calibrated), 4),
        "portable_ms": round(milliseconds(run_portable), 4),
        "floor_ms": floor_ms(shape.tokens * shape.kv_heads * stored),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    torch.manual_seed(0)
    for shape in SHAPES:
        print(append_row("context", measure(shape)), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
