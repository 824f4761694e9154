"""Both decodes, portable and CUDA, against the float64 oracle over the decoded cache; error at most twice that of plain torch."""

from dataclasses import replace

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.cuda.variant import supported
from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format

from ..kernels.oracle import make_batch, random_basis
from ..kernels.test_basis import HEADS
from .decodes import prepared
from .shadow import attend, cached

pytestmark = pytest.mark.gpu
# Around page (32) and unit (16) edges and, with several splits, around split edges.
LENGTHS = [8, 15, 16, 17, 31, 32, 33, 64, 255, 256, 257, 600]


@pytest.fixture(params=("portable", "cuda"))
def which(request):
    return request.param


def skip_unsupported(which, fmt):
    if which == "cuda" and not supported(fmt, 32, 4, 1):
        pytest.skip("the portable decode alone covers this format")


def kernel(which, batch, dtype, max_query_len, scale, **options):
    decode, scratch = prepared(which, batch, dtype, max_query_len, **options)
    query = batch.query.to(dtype)
    out = torch.full_like(query, float("nan"))
    decode(
        query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        out,
        scratch,
        batch.fmt,
        scale,
        max_query_len,
        **options,
    )
    return out


def oracle(batch, dtype, scale, **options):
    query = batch.query.to(dtype).double()
    return reference.attend(
        query, batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.fmt, scale, **options
    )


def plain_torch(batch, dtype, scale, basis=None):
    """Attention of the same decoded cache in ``dtype``: what an uncompressed engine computes, rounding included."""
    out = torch.zeros_like(batch.query, dtype=dtype)
    starts = batch.query_start_loc.tolist()
    for r, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[r], starts[r + 1])
        if rows.stop > rows.start and length:
            keys, values = cached(batch.cache, batch.block_table[r], 0, length, batch.fmt, basis)
            out[rows] = attend(batch.query[rows].to(dtype), keys.to(dtype), values.to(dtype), scale)
    return out


def first_heads(x, kv_heads, group):
    """``[T, kv_heads * 16, d]`` to the first ``group`` query heads of each KV head."""
    return x.unflatten(1, (kv_heads, 16))[:, :, :group].flatten(1, 2)


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("head_size", (64, 96, 128, 256))
@pytest.mark.parametrize(
    ("preset", "dtype"), [*((name, torch.bfloat16) for name in (*PRESETS, LOSSLESS_PRESET)), ("turboquant", torch.float16)]
)
def test_grid(which, preset, head_size, dtype, seed):
    """Query lengths x KV heads x group sizes over ragged lengths, in padded pools full of 0xFF, tables ending in -1."""
    fmt = page_format(preset, head_size)
    skip_unsupported(which, fmt)
    scale = head_size**-0.5
    worst = 0.0
    for kv_heads in (1, 2, 4, 8):
        for query_len in (1, 2, 3, 5, 8):
            lengths = [max(length, query_len) for length in LENGTHS]
            # Query heads know nothing of each other: the first of sixteen are any smaller group's, and so is their truth.
            whole = make_batch(fmt, lengths, [query_len] * len(lengths), kv_heads, 16, 32, seed, device="cuda")
            whole_truth, whole_plain = oracle(whole, dtype, scale), plain_torch(whole, dtype, scale)
            for group in (1, 2, 4, 6, 7, 8, 16):
                query, truth, plain = (first_heads(x, kv_heads, group) for x in (whole.query, whole_truth, whole_plain))
                batch = replace(whole, query=query)
                ours, torchs = relative(kernel(which, batch, dtype, query_len, scale), truth), relative(plain, truth)
                worst = max(worst, ours / torchs)
                assert ours <= 2 * torchs, (kv_heads, query_len, group, ours, torchs)
    print(f"{which} {preset} d={head_size} {dtype}: at most {worst:.2f} of plain torch's error")


@pytest.mark.parametrize("head_size", (80, 112, 160, 192, 512, 576))
@pytest.mark.parametrize("preset", PRESETS)
def test_other_head_sizes(preset, head_size, seed):
    fmt = page_format(preset, head_size)
    batch = make_batch(fmt, [17, 300], [1, 3], 2, 3, 16, seed, device="cuda")
    truth = oracle(batch, torch.bfloat16, 0.1)
    ours = relative(kernel("portable", batch, torch.bfloat16, 3, 0.1), truth)
    assert ours <= 2 * relative(plain_torch(batch, torch.bfloat16, 0.1), truth)


@pytest.mark.parametrize("head_size", (64, 128, 256))
@pytest.mark.parametrize(("preset", "dtype"), [*((name, torch.bfloat16) for name in PRESETS), ("turboquant", torch.float16)])
def test_under_a_key_basis(which, preset, head_size, dtype, seed):
    """Anisotropic bases; keys around a mean of size 30, with which plain torch loses much, and around none; group sizes and
    query lengths of one MMA tile and of more."""
    fmt = page_format(preset, head_size)
    skip_unsupported(which, fmt)
    buckets = 1 if dtype == torch.float16 else 20
    fitted = random_basis(torch.Generator().manual_seed(seed), HEADS, head_size, buckets=buckets).to(torch.device("cuda"))
    worst = 0.0
    for group, query_len in ((1, 1), (4, 1), (6, 1), (16, 1), (4, 3), (2, 8)):
        basis = fitted if group == 1 else replace(fitted, means=torch.zeros_like(fitted.means))
        lengths = [max(length, query_len) for length in LENGTHS]
        batch = make_batch(fmt, lengths, [query_len] * len(lengths), HEADS, group, 32, seed, device="cuda", basis=basis)
        scale = head_size**-0.5
        truth = oracle(batch, dtype, scale, basis=basis)
        ours = relative(kernel(which, batch, dtype, query_len, scale, basis=basis), truth)
        torchs = relative(plain_torch(batch, dtype, scale, basis), truth)
        worst = max(worst, ours / torchs)
        assert ours <= 2 * torchs, (group, query_len, ours, torchs)
    print(f"{which} {preset} d={head_size} {dtype} under a basis: at most {worst:.2f} of plain torch's error")


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


@pytest.mark.parametrize("options", ({"window": 1}, {"window": 7}, {"window": 100}, {"soft_cap": 2.0}, {"sinks": True}))
def test_window_soft_cap_and_sinks(which, options, seed):
    batch = make_batch(
        page_format("turboquant", 128), LENGTHS, [1, 2, 3, 5, 8, 1, 2, 3, 5, 8, 1, 2], 2, 4, 16, seed, device="cuda"
    )
    if "sinks" in options:
        options = {"sinks": torch.randn(8, device="cuda")}
    truth = oracle(batch, torch.bfloat16, 0.3, **options)
    # bf16 rounds the output by 2**-9 and the queries alike.
    assert relative(kernel(which, batch, torch.bfloat16, 8, 0.3, **options), truth) < 2**-8


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
