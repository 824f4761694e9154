"""Every kernel on small awkward shapes, for NVIDIA's compute-sanitizer; results are checked elsewhere.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no python -m tests.gpu.sanitize
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m tests.gpu.sanitize cuda copies

``copies``: the CUDA decode as cards without bulk copies run it. Without torch's caching every tensor is an allocation of its
own, so that a byte beyond its end is an error. Pools and tables are made on the CPU: what runs under the tool is this
project's kernels and copies.

What racecheck may say is a warning, never an error: that a warp's reads of a pair of units that bulk copies brought are not
synchronised with them ("invalid async operation synchronization"). On an H100 once in some hundred pairs; on an H200 in none of
330,000 with heads of 128 dims, with 256 in one of some ten thousand, where looked at the first pair of a ring. Why is not known:
a ring of the same copies, barriers and waits without the decode has none in three million pairs. FlashAttention's authors report
the like; ``copies`` has no warnings. That each lane waits for each copy, and no copy starts before the last read, is checked
where copies land as late as they may: `tests/kernels/emulator_copies.h`.
"""

import sys
from dataclasses import replace
from itertools import product

import torch

from vllm_turboquant.kernels import prefill, store
from vllm_turboquant.kernels.cuda import context, launch
from vllm_turboquant.kernels.cuda import store as cuda_store
from vllm_turboquant.kernels.cuda.variant import supported, supported_pages
from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format
from vllm_turboquant.kernels.recent_attend import attend_recent
from vllm_turboquant.kernels.recent_keep import keep

from ..kernels.oracle import make_batch, random_basis
from ..kernels.recent_oracle import make_recent
from .decodes import prepared

LENGTHS = [1, 16, 33, 0, 700]
BF16 = torch.bfloat16
BULK_ARCH = launch._BULK_ARCH


def cases():
    """(format, group, query tokens a request, options): every preset; head sizes, groups and options of the default one."""
    for preset in (*PRESETS, LOSSLESS_PRESET):
        yield page_format(preset, 128), 4, 1, {}
    for head_size, (group, query_len) in product((64, 80, 256), ((4, 1), (7, 3))):
        yield page_format("turboquant", head_size), group, query_len, {}
    for options in ({"window": 40}, {"soft_cap": 5.0}, {"sinks": torch.zeros(8)}):
        yield page_format("turboquant", 128), 4, 2, options
    for head_size, group in ((64, 4), (128, 4), (128, 16), (256, 4)):
        basis = random_basis(torch.Generator().manual_seed(head_size), 2, head_size).to(torch.device("cuda"))
        yield page_format("turboquant", head_size), group, 1, {"basis": basis}


def on_card(batch):
    """The batch with its pages where the last one ends with the allocation."""
    cache = batch.cache.contiguous().cuda()
    tensors = {name: getattr(batch, name).cuda() for name in ("block_table", "seq_lens", "query_start_loc")}
    return replace(batch, cache=cache, query=batch.query.to(BF16).cuda(), **tensors)


def run_decode(kernel, batch, query_len, options):
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    run, scratch = prepared("portable" if kernel == "portable" else "cuda", batch, BF16, query_len, **options)
    tables = batch.block_table, batch.seq_lens, batch.query_start_loc
    run(batch.query, batch.cache, *tables, torch.empty_like(batch.query), scratch, batch.fmt, 0.1, query_len, **options)


def run_store(store, batch, basis):
    """Five tokens, the last one in the pool's last slot."""
    slots = torch.arange(5, dtype=torch.int64).cuda() * 7 + batch.cache.shape[0] * 32 - 29
    rows = [torch.randn(5, 2, batch.fmt.head_size).to(BF16).cuda() for _ in range(2)]
    store(*rows, batch.cache, slots, batch.fmt, basis)


def run_context(load_context, batch, basis):
    first, starts = (torch.tensor(x, dtype=torch.int32).cuda() for x in ([0, 3, 31, 0, 17], [0, 1, 14, 16, 16, 699]))
    sides = [torch.empty(699, 2, batch.fmt.head_size, dtype=BF16, device="cuda") for _ in range(2)]
    load_context(batch.cache, batch.block_table, first, starts, 683, *sides, batch.fmt, basis=basis)


def run_recent(head_size, group, options):
    """Attention to exact tokens, and the copy into pools whose last frame ends with the allocation."""
    batch = make_recent([(3, 3, 0), (90, 3, 22), (0, 0, 0), (64, 1, 30)], 3, 2, group, head_size, 32, BF16, 0, **options)
    tensors = [x.contiguous().cuda() for x in batch.tensors]
    query, out, lse = (x.contiguous().cuda() for x in (batch.query, batch.out, batch.lse))
    attend_recent(query, out, lse, *tensors, 0.3, batch.block_size, batch.max_query_len, **options)
    pools, frame_of = tensors[:2], tensors[2]
    slots = torch.arange(len(frame_of) * 16 - 21, dtype=torch.int64).cuda()
    rows = [torch.randn(len(slots), 2, head_size).to(BF16).cuda() for _ in range(2)]
    keep(*rows, slots, *pools, frame_of, torch.zeros(2, head_size).cuda())


def main():
    kernels = sys.argv[1:] or ["cuda", "copies", "portable"]
    torch.cuda.init()
    for fmt, group, query_len, options in cases():
        queries, basis = [min(query_len, length) for length in LENGTHS], options.get("basis")
        batch = on_card(make_batch(fmt, LENGTHS, queries, 2, group, 32, 0, basis=basis))
        for kernel in kernels:
            if kernel == "portable":
                run_store(store.store, batch, basis)
                run_context(prefill.load_context, batch, basis)
            elif kernel == "cuda" and supported_pages(fmt, 32):
                assert cuda_store.prepare(batch.cache.device, fmt, 32, BF16, basis)
                run_store(cuda_store.store, batch, basis)
                assert context.prepare(batch.cache.device, fmt, 32, BF16, basis)
                run_context(context.load_context, batch, basis)
            launch._BULK_ARCH = 1000 if kernel == "copies" else BULK_ARCH
            launch._kernel.cache_clear()
            if kernel == "portable" or supported(fmt, 32, group, query_len):
                run_decode(kernel, batch, query_len, options)
            torch.cuda.synchronize()
            print(f"ran: {kernel}, {fmt.preset.name} d={fmt.head_size} group {group} query tokens {query_len} {list(options)}")
    if "portable" in kernels:
        for head_size, group, options in ((64, 4, {}), (80, 7, {"window": 45}), (256, 16, {"soft_cap": 2.0})):
            run_recent(head_size, group, options)
            torch.cuda.synchronize()
            print(f"ran: recent window, d={head_size} group {group} {list(options)}")
    assert not launch._counters(torch.cuda.current_device()).any()


if __name__ == "__main__":
    main()
