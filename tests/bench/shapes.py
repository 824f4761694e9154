"""Shapes of decode attention that are timed, their block tables and lengths, a calibrated key basis, and the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton

from vllm_turboquant.kernels.basis import BUCKET, MAX_BUCKETS, KeyBasis, balanced_transform, key_basis
from vllm_turboquant.kernels.format import DEFAULT_PRESET


@dataclass(frozen=True)
class Shape:
    """``batch`` requests of ``length`` tokens, or of uniform lengths up to it; ``heads`` queries, ``kv_heads``, head size."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    page: int = 16
    preset: str = DEFAULT_PRESET
    uniform: bool = False
    rivals: bool = True


QUICK = (Shape(64, 32768), Shape(32, 8192), Shape(1, 32768), Shape(64, 32768, uniform=True))
TABLE = (
    *(Shape(b, n) for b, n in ((64, 32768), (32, 8192), (8, 32768), (128, 2048), (1, 131072), (1, 32768))),
    Shape(64, 32768, uniform=True),
    *(Shape(b, n) for b, n in ((1, 128), (1, 1024), (1, 4096), (16, 4096), (256, 512))),
    Shape(32, 8192, heads=28, kv_heads=4),
    Shape(32, 8192, heads=16, kv_heads=2, head_size=256),
    Shape(32, 16384, head_size=64),
    Shape(64, 32768, preset="turboquant-k3v3"),
)
CONTEXT = tuple(Shape(32, 1024 * 2**i) for i in range(6))
PAGES = tuple(Shape(b, n, page=page, rivals=False) for b, n in ((64, 32768), (32, 8192)) for page in (16, 32, 64))
GROUPS = {"table": TABLE, "context": CONTEXT, "pages": PAGES}


@cache
def lengths_of(shape: Shape) -> torch.Tensor:
    """int32 ``[B]``, the same for every kernel of a shape."""
    if not shape.uniform:
        return torch.full((shape.batch,), shape.length, dtype=torch.int32, device="cuda")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, shape.length + 1, (shape.batch,), generator=generator, dtype=torch.int32).cuda()


def table_of(shape: Shape, page: int) -> tuple[torch.Tensor, int]:
    """A random block table wide enough for every request, and how many blocks it uses."""
    width = -(-shape.length // page)
    return torch.randperm(shape.batch * width, device="cuda").to(torch.int32).view(shape.batch, width), shape.batch * width


@cache
def calibrated_basis(kv_heads: int, head_size: int, length: int) -> KeyBasis:
    """A basis as calibration makes it for sequences up to ``length``; fitted to random moments, which cost as much time."""
    rng = torch.Generator().manual_seed(0)
    parts = torch.randn(2, kv_heads, head_size, head_size, generator=rng, dtype=torch.float64)
    buckets = min(MAX_BUCKETS, -(-length // BUCKET))
    means = torch.randn(kv_heads, buckets, head_size, generator=rng)
    transform = balanced_transform(*(parts @ parts.mT / head_size))
    return key_basis(transform, means, torch.randn(kv_heads, head_size, generator=rng)).to(torch.device("cuda"))


def milliseconds(call: Callable[[], object]) -> float:
    """Median of graph replays, after warm-up outside the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return float(triton.testing.do_bench(graph.replay, warmup=25, rep=150, return_mode="median"))
