"""Decode attention in milliseconds: this project's CUDA kernel, FlashAttention 3 in bf16 and fp8, vLLM's own TurboQuant.

    python -m tests.bench.decode                 every shape, about a minute on an H100
    python -m tests.bench.decode --quick         four shapes
    python -m tests.bench.decode --only pages    one of: table, context, pages
    python -m tests.bench.decode --no-rivals     our kernel alone

Appends a row a shape to results/decode_<card>.jsonl. All kernels run in one process; a time is the median of replays of a
CUDA graph with one call, by triton's do_bench. Ours includes the rotation of the query, the merge of splits and the rotation
back: ours_ms data-free, calibrated_ms under a key basis. FlashAttention's scheduler metadata is computed beforehand, as vLLM
does. `floor_ms` is the time the card's memory needs for the compressed tokens alone. A rival that does not fit in memory or
refuses a shape is null.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.basis import KeyBasis
from vllm_turboquant.kernels.cuda import launch
from vllm_turboquant.kernels.format import DEFAULT_PRESET, PageFormat, page_format

from .rivals import rivals
from .rows import append_row, floor_ms
from .shapes import GROUPS, QUICK, Shape, calibrated_basis, lengths_of, milliseconds, table_of


def random_pages(blocks: int, kv_heads: int, page: int, fmt: PageFormat) -> torch.Tensor:
    """uint8 ``[blocks, Hk, page, C]``: random codes, fp16 scales from 0.6 to 1.3."""
    cache = torch.empty(blocks, kv_heads, page, fmt.slot_bytes, dtype=torch.uint8, device="cuda")
    units = cache.view(-1, fmt.unit_bytes)
    for part in units.split(1 << 18):
        part.random_(0, 256)
        scales = torch.rand(part.shape[0], (fmt.unit_bytes - fmt.scalar_base) // 2, device="cuda") * 0.7 + 0.6
        part[:, fmt.scalar_base :] = scales.to(torch.float16).view(torch.uint8)
    return cache


def our_call(
    shape: Shape, lengths: torch.Tensor, basis: KeyBasis | None = None
) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
    """The launch and the tensors it works on."""
    fmt = page_format(shape.preset, shape.head_size)
    group, device = shape.heads // shape.kv_heads, torch.device("cuda", torch.cuda.current_device())
    assert launch.prepare(device, fmt, shape.page, torch.bfloat16, group, 1, basis=basis), "the CUDA decode is not usable here"
    table, blocks = table_of(shape, shape.page)
    tensors = {
        "query": torch.randn(shape.batch, shape.heads, shape.head_size, device="cuda", dtype=torch.bfloat16),
        "cache": random_pages(blocks, shape.kv_heads, shape.page, fmt),
        "block_table": table,
        "seq_lens": lengths,
        "query_start_loc": torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32),
    }
    out = torch.empty_like(tensors["query"])
    rows = 0 if basis is None else shape.batch * shape.heads
    scratch = torch.empty(launch.scratch_floats(group, shape.head_size, 1, device, rows), device="cuda")

    options = {"scratch": scratch, "fmt": fmt, "scale": shape.head_size**-0.5, "max_query_len": 1, "basis": basis}

    def call() -> None:
        launch.decode(**tensors, out=out, **options)

    return call, {**tensors, "out": out}


def check(shape: Shape) -> None:
    """Our kernel against the float64 reference on a few requests of this kind, without and with a key basis."""
    lengths = torch.tensor([1, 17, 333, 2048, 700], dtype=torch.int32, device="cuda")
    for basis in (None, calibrated_basis(shape.kv_heads, shape.head_size, 2048)):
        call, tensors = our_call(replace(shape, batch=5, length=2048), lengths, basis)
        call()
        out = tensors.pop("out")
        fmt = page_format(shape.preset, shape.head_size)
        truth = reference.attend(**tensors, fmt=fmt, scale=shape.head_size**-0.5, basis=basis)
        error = float((out.double() - truth).norm() / truth.norm())
        assert error < 2**-8, f"{shape}: relative error {error}"


def measure(shape: Shape, with_rivals: bool) -> dict[str, object]:
    """One row."""
    lengths = lengths_of(replace(shape, page=16, preset=DEFAULT_PRESET))
    times = []
    for basis in (None, calibrated_basis(shape.kv_heads, shape.head_size, shape.length)):
        call, tensors = our_call(shape, lengths, basis)
        times.append(round(milliseconds(call), 4))
        del call, tensors
        torch.cuda.empty_cache()
    stored = int(lengths.sum()) * shape.kv_heads * page_format(shape.preset, shape.head_size).slot_bytes
    row: dict[str, object] = {
        "B": shape.batch,
        "L": shape.length,
        "lengths": "uniform" if shape.uniform else "equal",
        "Hq": shape.heads,
        "Hk": shape.kv_heads,
        "D": shape.head_size,
        "page": shape.page,
        "preset": shape.preset,
        "ours_ms": times[0],
        "calibrated_ms": times[1],
        "fa3_bf16_ms": None,
        "fa3_fp8_ms": None,
        "builtin_ms": None,
    }
    if with_rivals and shape.rivals:
        row |= rivals(replace(shape, page=16, preset=DEFAULT_PRESET))
    return {**row, "floor_ms": floor_ms(stored)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=GROUPS, action="append")
    parser.add_argument("--no-rivals", action="store_true")
    arguments = parser.parse_args()
    shapes = QUICK if arguments.quick else [s for name in arguments.only or GROUPS for s in GROUPS[name]]
    torch.manual_seed(0)
    for kind in dict.fromkeys(replace(s, batch=5, length=2048, uniform=False, rivals=False) for s in shapes):
        check(kind)
    for shape in shapes:
        print(append_row("decode", measure(shape, not arguments.no_rivals)), flush=True)


if __name__ == "__main__":
    main()
