"""The newest tokens beside the pages, on a card: claims without waiting, the copy, the attention, replays of both."""

from dataclasses import replace

import pytest
import torch

from vllm_turboquant.kernels.format import page_format
from vllm_turboquant.kernels.recent_attend import attend_recent
from vllm_turboquant.kernels.recent_claim import RecentUnits, frames_needed
from vllm_turboquant.kernels.recent_keep import keep

from ..kernels.recent_oracle import make_recent, merged
from ..kernels.recent_pages import RecentTokens
from .decodes import prepared

pytestmark = pytest.mark.gpu
SCALE = 0.3
# Length, query tokens, where exact tokens begin.
REQUESTS = [(3, 3, 0), (90, 3, 22), (40, 2, 39), (41, 3, 40), (20, 3, 20), (0, 0, 0), (64, 1, 30)]


def attend(batch, out, **options):
    attend_recent(batch.query, out, batch.lse, *batch.tensors, SCALE, batch.block_size, batch.max_query_len, **options)
    return out


def defined(x):
    """Rows of padded requests hold NaN, before and after."""
    return x[~x.isnan().any(-1)]


@pytest.mark.parametrize(("head_size", "group"), ((64, 1), (80, 7), (128, 4), (256, 16), (576, 2)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("options", ({}, {"window": 5}, {"window": 45}, {"soft_cap": 2.0}, {"sinks": True}))
def test_attend(head_size, group, dtype, options, seed):
    batch = make_recent(REQUESTS, 3, 2, group, head_size, 32, dtype, seed, **options, device="cuda")
    if "sinks" in options:
        options = {"sinks": batch.sinks}
    out, truth = attend(batch, batch.out.clone(), **options), merged(batch, **options)
    assert torch.equal(out.isnan(), truth.isnan())
    # The output's rounding, and that of what it held before; fp32's scores are sums of up to 576 terms.
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-17}[dtype]
    assert float((defined(out).double() - defined(truth)).norm() / defined(truth).norm()) < bound


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("with_mean", (False, True))
def test_keep(dtype, with_mean, seed):
    g = torch.Generator("cuda").manual_seed(seed)
    tokens, heads, head_size, frames, units = 1000, 3, 80, 40, 100
    both = torch.randn(tokens + 4, 2, heads + 1, head_size, generator=g, device="cuda").to(dtype)
    key, value = both[:, 0, :heads], both[:, 1, :heads]
    mean = torch.randn(heads, head_size, generator=g, device="cuda") if with_mean else None
    frame_of = torch.full((units + 1,), -1, dtype=torch.int32, device="cuda")
    chosen = torch.randperm(units, generator=g, device="cuda")[:frames]
    frame_of[chosen] = torch.randperm(frames, generator=g, device="cuda").to(torch.int32)
    slots = torch.randperm(units * 16, generator=g, device="cuda")[:tokens]
    slots[::7] = -1
    pools = [torch.full((frames, 16, heads, head_size), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    keep(key, value, slots, *pools, frame_of, mean)
    expected = [torch.full_like(pool, float("nan")) for pool in pools]
    kept = (slots >= 0) & (frame_of[slots // 16] >= 0)
    place = (frame_of[slots // 16].long()[kept], slots[kept] % 16)
    k = key[:tokens][kept]
    expected[0][place] = k if mean is None else (k.float() - mean).to(dtype)
    expected[1][place] = value[:tokens][kept]
    for ours, theirs in zip(pools, expected, strict=True):
        assert torch.equal(ours.nan_to_num(1e4), theirs.nan_to_num(1e4))


def test_replay_with_other_ends(seed):
    """Captured at dummy lengths with nothing exact; replayed with lengths, tables and ends of real requests."""
    batch = make_recent(REQUESTS, 3, 2, 4, 128, 16, torch.bfloat16, seed, device="cuda")
    _, _, frame_of, table, lengths, starts, ends = batch.tensors
    real = [x.clone() for x in (frame_of, table, lengths, starts, ends)]
    out = batch.out.clone()
    frame_of.fill_(-1)
    table.fill_(-1)
    lengths.fill_(1)
    ends.fill_(1)
    starts.copy_(torch.arange(len(starts)))
    attend(batch, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(batch, out)
    graph.replay()
    assert torch.equal(out.nan_to_num(1e4), batch.out.nan_to_num(1e4))
    for mine, theirs in zip((frame_of, table, lengths, starts, ends), real, strict=True):
        mine.copy_(theirs)
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed.nan_to_num(1e4), attend(batch, batch.out.clone()).nan_to_num(1e4))
    truth = merged(batch)
    assert float((defined(replayed).double() - defined(truth)).norm() / defined(truth).norm()) < 2**-8
    # The same requests with nothing exact any more.
    ends.copy_(lengths)
    out.copy_(batch.out)
    graph.replay()
    assert torch.equal(out.nan_to_num(1e4), batch.out.nan_to_num(1e4))


@pytest.mark.parametrize("which", ("portable", "cuda"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("options", ({}, {"window": 5}, {"window": 40}, {"soft_cap": 2.0}, {"sinks": True}, {"buckets": 3}))
@pytest.mark.parametrize(("preset", "head_size"), (("turboquant-k3v3", 128), ("turboquant-k2v2", 64), ("turboquant-k3v3", 256)))
def test_decode_beside_exact_tokens(preset, head_size, options, dtype, which, seed):
    """Both decodes up to ``ends``, and attention from there on."""
    beside = RecentTokens(page_format(preset, head_size), 2, 4, 32, seed, **options, device="cuda")
    query = beside.query.to(dtype)
    settings = {name: value for name, value in beside.options.items() if value is not None}
    on_card = replace(beside.batch, cache=beside.pages[0], block_table=beside.pages[1], seq_lens=beside.pages[2])
    on_card = replace(on_card, query_start_loc=beside.pages[3], query=beside.query)
    extra = {"recent": True} if which == "cuda" else {}
    decode, scratch = prepared(which, on_card, dtype, 3, **settings, **extra)
    out, lse = torch.full_like(query, float("nan")), torch.full(query.shape[:2], float("nan"), device="cuda")
    decode(query, *beside.pages, out, scratch, beside.fmt, SCALE, 3, **settings, ends=beside.ends, lse=lse)
    # The weights', the output's and the query's rounding, twice; means of a few a dim and logits of ten.
    beside.check(out, lse, SCALE, attend_recent, rtol=2**-5, atol=2**-5)


def steps(seed, requests, max_query_len, block_size, count):
    """Batches of decoding requests with tables of their own, that go on by up to ``max_query_len`` tokens a step."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randperm(requests * 8, generator=g).view(requests, 8).to(torch.int32)
    lengths = torch.randint(1, 60, (requests,), generator=g)
    starts = torch.arange(requests + 1, dtype=torch.int32) * max_query_len
    for _ in range(count):
        lengths = lengths + torch.randint(1, max_query_len + 1, (requests,), generator=g)
        position = (lengths[:, None] + torch.arange(max_query_len)).flatten()
        request = torch.arange(requests).repeat_interleave(max_query_len)
        slots = table[request, position // block_size].long() * block_size + position % block_size
        yield table, (lengths + max_query_len).to(torch.int32), starts, slots


def state(recent):
    live = recent.owner[:-1].cpu() >= 0
    return [x.cpu() for x in (recent.frame_of, recent.owner[:-1], recent.ends)] + [recent.first[:-1].cpu()[live]]


def pair(requests, max_query_len, block_size, frames):
    sizes = (requests * 8 * block_size // 16, frames, requests, 20, max_query_len, block_size)
    return RecentUnits(*sizes, torch.device("cpu")), RecentUnits(*sizes, torch.device("cuda"))


@pytest.mark.parametrize("share", (1, 0.4))
def test_claim_equals_that_on_cpu_and_never_waits(share, seed):
    requests, query_len, block_size = 9, 3, 32
    near, far = pair(requests, query_len, block_size, int(share * frames_needed(requests, 20, query_len)))
    exact = 0
    for batch in steps(seed, requests, query_len, block_size, 12):
        there = [x.cuda() for x in batch]
        near.claim(*batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            far.claim(*there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for ours, theirs in zip(state(far), state(near), strict=True):
            assert torch.equal(ours, theirs)
        exact += int((batch[1] - near.ends).sum())
    assert exact


def test_claim_may_be_captured(seed):
    requests, query_len, block_size = 9, 3, 32
    near, far = pair(requests, query_len, block_size, 40)
    batches = list(steps(seed, requests, query_len, block_size, 12))
    inputs = [x.cuda() for x in batches[0]]
    far.claim(*inputs)
    near.claim(*batches[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        far.claim(*inputs)
    for batch in batches[1:]:
        for mine, theirs in zip(inputs, batch, strict=True):
            mine.copy_(theirs)
        graph.replay()
        near.claim(*batch)
        for ours, theirs in zip(state(far), state(near), strict=True):
            assert torch.equal(ours, theirs)
