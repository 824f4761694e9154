"""Both decodes where batches, pools and graphs are awkward: dead rows, poison, far pages, replays, other cards' copies."""

import pytest
import torch

from vllm_turboquant.kernels.format import page_format

from ..kernels.oracle import make_batch, random_basis
from ..kernels.test_basis import HEADS
from .decodes import LENGTHS, kernel, oracle, prepared, relative

pytestmark = pytest.mark.gpu


def test_graph_replay_under_a_key_basis(which, seed):
    """The basis's matrices are read at replay where they were at capture."""
    basis = random_basis(torch.Generator().manual_seed(seed), HEADS, 128).to(torch.device("cuda"))
    batch = make_batch(page_format("turboquant", 128), [100, 1095], [2, 2], HEADS, 4, 16, seed, device="cuda", basis=basis)
    decode, scratch = prepared(which, batch, torch.bfloat16, 2, basis=basis)
    query = batch.query.to(torch.bfloat16)
    out = torch.zeros_like(query)

    def step():
        decode(
            query, batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc, out, scratch, batch.fmt, 0.1, 2,
            basis=basis,
        )  # fmt: skip

    step()
    eager = out.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out.zero_()
    graph.replay()
    assert torch.equal(out, eager)
    assert relative(out, oracle(batch, torch.bfloat16, 0.1, basis=basis)) < 2**-8


def test_rows_of_length_zero(which, seed):
    batch = make_batch(page_format("turboquant", 64), [0, 40, 0], [1, 2, 3], 2, 2, 16, seed, device="cuda")
    out = kernel(which, batch, torch.bfloat16, 3, 0.1)
    assert not out[0].any() and not out[3:].any() and torch.isfinite(out).all()


def test_poison_changes_nothing(which, seed):
    fmt = page_format("turboquant", 96 if which == "portable" else 64)
    batches = [make_batch(fmt, [5, 33, 64, 300], [1, 2, 3, 1], 2, 4, 32, seed, poison, "cuda") for poison in (0xFF, 0)]
    assert torch.equal(*(kernel(which, batch, torch.bfloat16, 3, 0.1) for batch in batches))


@pytest.mark.parametrize("query_len", (1, 2, 4, 8))
def test_graph_replay_equals_eager(which, query_len, seed):
    """Captured once at dummy lengths (sequence = query), replayed with ragged lengths, other tables and dead rows."""
    fmt = page_format("turboquant", 128)
    rows = 6
    first = make_batch(fmt, [query_len] * rows, [query_len] * rows, 2, 4, 16, seed, device="cuda")
    query = first.query.to(torch.bfloat16)
    decode, scratch = prepared(which, first, torch.bfloat16, query_len)
    out = torch.zeros_like(query)
    live = make_batch(
        fmt, [query_len + n for n in (1, 15, 16, 17, 1095, 0)], [query_len] * rows, 2, 4, 16, seed + 1, device="cuda"
    )
    lengths, starts = first.seq_lens.clone(), first.query_start_loc.clone()
    table = torch.full_like(live.block_table, -1)
    table[:, : first.block_table.shape[1]] = first.block_table
    cache = live.cache

    def step():
        decode(query, cache, table, lengths, starts, out, scratch, fmt, 0.1, query_len)

    table.copy_(live.block_table)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    query.copy_(live.query)
    lengths.copy_(live.seq_lens)
    lengths[-1] = 0  # a padded row
    table[-1] = -1
    graph.replay()
    replayed = out.clone()
    out.fill_(float("nan"))
    step()
    assert torch.equal(replayed, out)
    batch = type(live)(fmt, cache, table, lengths, starts, query.double(), [], [])
    assert relative(replayed, oracle(batch, torch.bfloat16, 0.1)) < 2**-8


@pytest.mark.parametrize("block_size", (16, 32, 64))
@pytest.mark.parametrize("head_size", (64, 128, 256))
def test_block_sizes(which, head_size, block_size, seed):
    """Lengths far apart, so that shares of the work begin and end anywhere."""
    lengths = [1, 40000, 15, 0, 4095, 16, 700]
    batch = make_batch(page_format("turboquant", head_size), lengths, [1] * 7, 2, 4, block_size, seed, device="cuda")
    truth = oracle(batch, torch.bfloat16, 0.1)
    out = kernel(which, batch, torch.bfloat16, 1, 0.1)
    for r, length in enumerate(lengths):
        assert relative(out[r], truth[r]) < 2**-8 if length else not out[r].any(), length


def test_equal_lengths(which, seed):
    batch = make_batch(page_format("turboquant", 128), [2048] * 48, [1] * 48, 8, 4, 16, seed, device="cuda")
    assert relative(kernel(which, batch, torch.bfloat16, 1, 0.1), oracle(batch, torch.bfloat16, 0.1)) < 2**-8


def test_pages_before_a_window_are_not_looked_up(which, seed):
    batch = make_batch(page_format("turboquant", 128), [300, 1000], [1, 1], 2, 4, 16, seed, device="cuda")
    truth = oracle(batch, torch.bfloat16, 0.1, window=40)
    for r, length in enumerate((300, 1000)):
        batch.block_table[r, : (length - 40) // 16] = 2**31 - 1
    assert relative(kernel(which, batch, torch.bfloat16, 1, 0.1, window=40), truth) < 2**-8


def test_pages_beyond_four_gib(which, seed):
    """The same pages at the end of a pool of 5 GiB: nothing changes."""
    fmt = page_format("turboquant", 128)
    batch = make_batch(fmt, [33, 600], [1, 1], 2, 4, 32, seed, device="cuda")
    near = kernel(which, batch, torch.bfloat16, 1, 0.1)
    blocks, heads, size, slot = batch.cache.shape
    total = 5 * 2**30 // (heads * size * slot)
    pool = torch.empty(total, heads, size, slot, dtype=torch.uint8, device="cuda")
    pool[-blocks:] = batch.cache
    batch.cache = pool
    batch.block_table = torch.where(batch.block_table < 0, -1, batch.block_table + total - blocks)
    assert torch.equal(near, kernel(which, batch, torch.bfloat16, 1, 0.1))


def test_the_cuda_decode_leaves_its_counters_zero_and_repeats_itself(seed):
    from vllm_turboquant.kernels.cuda import launch

    batch = make_batch(page_format("turboquant", 128), [5000, 70, 900], [1] * 3, 2, 4, 16, seed, device="cuda")
    outs = [kernel("cuda", batch, torch.bfloat16, 1, 0.1) for _ in range(20)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not launch._counters(torch.cuda.current_device()).any()


def test_cards_without_bulk_copies(monkeypatch, seed):
    """The copies that cards before compute capability 9.0 make, on whatever card this is."""
    from vllm_turboquant.kernels.cuda import launch

    cases = [("turboquant", 128, 4, 1), ("turboquant-k3v3", 64, 8, 2), ("turboquant", 256, 7, 1)]
    batches = [make_batch(page_format(p, d), LENGTHS, [q] * 12, 2, group, 32, seed, device="cuda") for p, d, group, q in cases]
    expected = [kernel("cuda", batch, torch.bfloat16, q, 0.1) for batch, (*_, q) in zip(batches, cases, strict=True)]
    monkeypatch.setattr(launch, "_BULK_ARCH", 1000)
    launch._kernel.cache_clear()
    outs = [kernel("cuda", batch, torch.bfloat16, q, 0.1) for batch, (*_, q) in zip(batches, cases, strict=True)]
    launch._kernel.cache_clear()
    assert all(torch.equal(out, bulk) for out, bulk in zip(outs, expected, strict=True))
