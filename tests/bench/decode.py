"""Decode attention in milliseconds: this project's CUDA kernel, FlashAttention 3 in bf16 and fp8, vLLM's own TurboQuant.

    python -m tests.bench.decode                 every shape, about three minutes on an H100
    python -m tests.bench.decode --quick         four shapes
    python -m tests.bench.decode --only pages    one of: table, context, pages
    python -m tests.bench.decode --no-rivals     our kernel alone

Appends a row a shape to results/decode_<card>.jsonl. All kernels run in one process; a time is the median of replays of a
CUDA graph with one call, by triton's do_bench. Ours includes the rotation of the query, the merge of splits and the rotation
back; FlashAttention's scheduler metadata is computed beforehand, as vLLM does. `floor_ms` is the time an H100's memory needs
for the compressed tokens alone. A rival that does not fit in memory or refuses a shape is null.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.cuda import launch
from vllm_turboquant.kernels.format import DEFAULT_PRESET, PageFormat, page_format

from .rows import append_row

H100_BYTES_PER_SECOND = 3.05e12
RIVAL_BLOCK = 16
SPARE_BYTES = 4 * 2**30


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


def random_pages(blocks: int, kv_heads: int, page: int, fmt: PageFormat) -> torch.Tensor:
    """uint8 ``[blocks, Hk, page, C]``: random codes, fp16 scales from 0.6 to 1.3."""
    cache = torch.empty(blocks, kv_heads, page, fmt.slot_bytes, dtype=torch.uint8, device="cuda")
    units = cache.view(-1, fmt.unit_bytes)
    for part in units.split(1 << 18):
        part.random_(0, 256)
        scales = torch.rand(part.shape[0], (fmt.unit_bytes - fmt.scalar_base) // 2, device="cuda") * 0.7 + 0.6
        part[:, fmt.scalar_base :] = scales.to(torch.float16).view(torch.uint8)
    return cache


def our_call(shape: Shape, lengths: torch.Tensor) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
    """The launch and the tensors it works on."""
    fmt = page_format(shape.preset, shape.head_size)
    group, device = shape.heads // shape.kv_heads, torch.device("cuda", torch.cuda.current_device())
    assert launch.prepare(device, fmt, shape.page, torch.bfloat16, group, 1), "the CUDA decode is not usable here"
    table, blocks = table_of(shape, shape.page)
    tensors = {
        "query": torch.randn(shape.batch, shape.heads, shape.head_size, device="cuda", dtype=torch.bfloat16),
        "cache": random_pages(blocks, shape.kv_heads, shape.page, fmt),
        "block_table": table,
        "seq_lens": lengths,
        "query_start_loc": torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32),
    }
    out = torch.empty_like(tensors["query"])
    scratch = torch.empty(launch.scratch_floats(group, shape.head_size, 1, device), device="cuda")

    def call() -> None:
        launch.decode(**tensors, out=out, scratch=scratch, fmt=fmt, scale=shape.head_size**-0.5, max_query_len=1)

    return call, {**tensors, "out": out}


def check(shape: Shape) -> None:
    """Our kernel against the float64 reference on a few requests of this kind."""
    lengths = torch.tensor([1, 17, 333, 2048, 700], dtype=torch.int32, device="cuda")
    call, tensors = our_call(replace(shape, batch=5, length=2048), lengths)
    call()
    out = tensors.pop("out")
    truth = reference.attend(**tensors, fmt=page_format(shape.preset, shape.head_size), scale=shape.head_size**-0.5)
    error = float((out.double() - truth).norm() / truth.norm())
    assert error < 2**-8, f"{shape}: relative error {error}"


def rival(call: Callable[[], float], name: str) -> float | None:
    try:
        return round(call(), 4)
    except (RuntimeError, ValueError, AssertionError, ImportError) as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
        return None


def flash_attention(shape: Shape, dtype: torch.dtype) -> float:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    b, d = shape.batch, shape.head_size
    table, blocks = table_of(shape, RIVAL_BLOCK)
    lengths = lengths_of(replace(shape, page=16, preset=DEFAULT_PRESET))
    starts = torch.arange(b + 1, device="cuda", dtype=torch.int32)
    size = (blocks, RIVAL_BLOCK, shape.kv_heads, d)
    if 2 * blocks * RIVAL_BLOCK * shape.kv_heads * d * 2 + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
        raise RuntimeError("does not fit in memory")
    q = torch.randn(b, shape.heads, d, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2))
    q = q.to(dtype)
    one = torch.ones(b, shape.kv_heads, device="cuda")
    scales = {} if dtype == torch.bfloat16 else {"q_descale": one, "k_descale": one, "v_descale": one}
    metadata = get_scheduler_metadata(
        batch_size=b,
        max_seqlen_q=1,
        max_seqlen_k=shape.length,
        num_heads_q=shape.heads,
        num_heads_kv=shape.kv_heads,
        headdim=d,
        cache_seqlens=lengths,
        qkv_dtype=dtype,
        cu_seqlens_q=starts,
        page_size=RIVAL_BLOCK,
        causal=True,
        window_size=(-1, -1),
        num_splits=0,
    )
    return milliseconds(
        lambda: flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=shape.length,
            softmax_scale=d**-0.5,
            causal=True,
            block_table=table,
            fa_version=3,
            scheduler_metadata=metadata,
            **scales,
        )
    )


def builtin(shape: Shape) -> float:
    """vLLM's turboquant_4bit_nc: its decode kernel with an identity in place of the rotation."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    d = shape.head_size
    c = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", d)
    table, blocks = table_of(shape, RIVAL_BLOCK)
    lengths = lengths_of(replace(shape, page=16, preset=DEFAULT_PRESET))
    q = torch.randn(shape.batch, shape.heads, d, device="cuda", dtype=torch.bfloat16)
    pages = torch.empty(blocks, RIVAL_BLOCK, shape.kv_heads, c.slot_size_aligned, device="cuda", dtype=torch.uint8).random_(
        0, 255
    )
    pages[..., c.key_packed_size - 2 : c.key_packed_size] = torch.tensor([0, 0x3C], dtype=torch.uint8, device="cuda")
    pages[..., -4:] = torch.tensor([0, 0x2C, 0, 0x3C], dtype=torch.uint8, device="cuda")
    turn = torch.eye(d, device="cuda")
    centroids = get_centroids(d, c.centroid_bits).to("cuda").float()
    return milliseconds(
        lambda: triton_turboquant_decode_attention(
            q,
            pages,
            table,
            lengths,
            turn,
            centroids,
            d**-0.5,
            c.key_mse_bits,
            c.key_packed_size,
            c.effective_value_quant_bits,
            key_fp8=c.key_fp8,
            norm_correction=c.norm_correction,
            PiT=turn,
        )
    )


@cache
def rivals(shape: Shape) -> dict[str, float | None]:
    """Times of the rivals, which know neither our presets nor our pages."""
    times = {
        "fa3_bf16_ms": rival(lambda: flash_attention(shape, torch.bfloat16), "FA3 bf16"),
        "fa3_fp8_ms": rival(lambda: flash_attention(shape, torch.float8_e4m3fn), "FA3 fp8"),
        "builtin_ms": rival(lambda: builtin(shape), "turboquant_4bit_nc"),
    }
    torch.cuda.empty_cache()
    return times


def measure(shape: Shape, with_rivals: bool) -> dict[str, object]:
    """One row."""
    lengths = lengths_of(replace(shape, page=16, preset=DEFAULT_PRESET))
    call, tensors = our_call(shape, lengths)
    ours = milliseconds(call)
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
        "ours_ms": round(ours, 4),
        "fa3_bf16_ms": None,
        "fa3_fp8_ms": None,
        "builtin_ms": None,
    }
    if with_rivals and shape.rivals:
        row |= rivals(replace(shape, page=16, preset=DEFAULT_PRESET))
    return {**row, "floor_ms": round(stored / H100_BYTES_PER_SECOND * 1e3, 4)}


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
