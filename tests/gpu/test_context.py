"""Older context, decoded into the workspace that FlashAttention reads, against the reference: both loaders."""

from dataclasses import replace

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format

from ..kernels.oracle import make_batch, random_basis
from ..kernels.test_basis import HEADS
from .shadow import cached

pytestmark = pytest.mark.gpu
FMT = page_format("turboquant", 128)


@pytest.fixture(params=("portable", "cuda"))
def loader(request):
    """A loader of pages of 32 tokens, made ready for a format, a dtype and a key basis."""

    def ready(fmt, dtype, basis=None):
        from vllm_turboquant.kernels import prefill
        from vllm_turboquant.kernels.cuda import context
        from vllm_turboquant.kernels.cuda.variant import supported_pages

        if request.param == "portable":
            return prefill.load_context
        if not supported_pages(fmt, 32):
            pytest.skip("left to the portable loader")
        assert context.prepare(torch.device("cuda", torch.cuda.current_device()), fmt, 32, dtype, basis)
        return context.load_context

    return ready


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("preset", (*PRESETS, LOSSLESS_PRESET))
@pytest.mark.parametrize("head_size", (64, 80, 128, 256, 576))
def test_context_is_decoded_into_the_models_basis(loader, preset, head_size, seed):
    fmt = page_format(preset, head_size)
    loaders = {dtype: loader(fmt, dtype) for dtype in (torch.bfloat16, torch.float16)}
    batch = make_batch(fmt, [300], [1], 2, 1, 32, seed, device="cuda")
    keys, values = cached(batch.cache, batch.block_table[0], 0, 300, fmt)
    for dtype, load_context in loaders.items():
        firsts, counts = [0, 17, 9, 31, 256], [300, 1, 0, 100, 44]
        starts = ints(2, *counts).cumsum(0).to(torch.int32)
        total = 2 + sum(counts)
        k, v = (torch.full((total + 3, 2, head_size), float("nan"), device="cuda", dtype=dtype) for _ in range(2))
        load_context(batch.cache, batch.block_table.expand(5, -1), ints(*firsts), starts, max(counts), k, v, fmt)
        for mine, truth in ((k, keys), (v, values)):
            assert mine[:2].isnan().all() and mine[total:].isnan().all()
            expected = torch.cat([truth[f : f + n] for f, n in zip(firsts, counts, strict=True)])
            # tf32 rounds the decoded vector and the rotation by 2**-12 each; the output type by 2**-9 or 2**-12.
            assert float((mine[2:total].double() - expected).norm() / expected.norm()) < 2**-8.5


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_size", (64, 128, 256))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_context_under_a_key_basis(loader, preset, head_size, dtype, seed):
    """Around no mean, which would hide errors of the matrix, and around one of size 30."""
    fmt = page_format(preset, head_size)
    buckets = 1 if dtype == torch.float16 else 3
    fitted = random_basis(torch.Generator().manual_seed(seed), HEADS, head_size, buckets=buckets, bucket=64)
    fitted = fitted.to(torch.device("cuda"))
    for basis in (fitted, replace(fitted, means=torch.zeros_like(fitted.means))):
        load_context = loader(fmt, dtype, basis)
        batch = make_batch(fmt, [300], [1], HEADS, 1, 32, seed, device="cuda", basis=basis)
        starts = 32 * torch.arange(10, device="cuda")
        truths = reference.load_vectors(batch.cache, batch.block_table[0, :10].long(), fmt, basis, starts)
        k, v = (torch.full((295, HEADS, head_size), float("nan"), device="cuda", dtype=dtype) for _ in range(2))
        load_context(batch.cache, batch.block_table[:1], ints(9), ints(2, 293), 291, k, v, fmt, basis=basis)
        for mine, truth in ((k, truths[0]), (v, truths[1])):
            assert mine[:2].isnan().all() and mine[293:].isnan().all()
            expected = truth[9:300]
            # As above. An entry of the matrix may be rounded by 2**-12, and sums of them may cancel to half.
            assert float((mine[2:293].double() - expected).norm() / expected.norm()) < 2**-8.5


def test_pages_and_rows_beyond_four_gib(loader, seed):
    load_context = loader(FMT, torch.bfloat16)
    near = make_batch(FMT, [100], [1], 2, 1, 32, seed, device="cuda")
    heads, size, slot = near.cache.shape[1:]
    pool = torch.empty(5 * 2**30, dtype=torch.uint8, device="cuda")
    far = pool.as_strided((5, heads, size, slot), (2**30 - 2**20, size * slot, slot, 1))
    far[1:] = near.cache[near.block_table[0, :4].long()]
    spread = [torch.empty(5 * 2**29, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    close = [torch.empty(90, heads, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    apart = [side.as_strided((90, heads, 128), (28 * 2**20, 128, 1)) for side in spread]
    outs = []
    for cache, table, sides in ((near.cache, near.block_table[:, :4], close), (far, ints(1, 2, 3, 4)[None], apart)):
        load_context(cache, table, ints(3), ints(0, 90), 90, *sides, FMT)
        outs.append(torch.cat(sides))
    assert torch.equal(*outs)


def test_ranges_are_read_when_a_graph_replays(loader, seed):
    """Captured at one bound, replayed with other ranges below it."""
    load_context = loader(FMT, torch.bfloat16)
    batch = make_batch(FMT, [300, 300], [1, 1], 2, 1, 32, seed, device="cuda")
    first, starts = ints(0, 0), ints(0, 1, 2)
    key, value = (torch.zeros(200, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def step():
        load_context(batch.cache, batch.block_table, first, starts, 100, key, value, FMT)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    first.copy_(ints(37, 200))
    starts.copy_(ints(5, 105, 182))
    graph.replay()
    replayed = key.clone(), value.clone()
    for side in (key, value):
        side[5:182] = float("nan")
    step()
    assert torch.equal(replayed[0], key) and torch.equal(replayed[1], value)
    assert torch.isfinite(key).all() and key[5:182].any(-1).all() and not key[182:].any()
