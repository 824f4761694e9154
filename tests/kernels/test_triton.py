"""The portable GPU kernels in Triton's interpreter, on the CPU, against the float64 reference.

The same kernels meet the whole grid on a card (tests/gpu); here every preset and every branch runs once.
"""

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format
from vllm_turboquant.kernels.packing import write_tokens

from .interpreted import attend_recent, decode, interpret, load_context, plan_decode, store  # noqa: F401
from .oracle import around_means, make_batch, random_basis
from .recent_pages import ENDS, RecentTokens

ALL = (*PRESETS, LOSSLESS_PRESET)
# fp32 against float64: sums of at most a few hundred terms, after an fp32 rotation.
FP32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize(("head_size", "dtype"), [(64, torch.bfloat16), (96, torch.float16), (160, torch.float32)])
def test_store_writes_the_references_bytes(preset, head_size, dtype, seed):
    """fp32 resolves a tie between two codes or two scales otherwise than float64: one vector in a thousand (tests/gpu)."""
    fmt = page_format(preset, head_size)
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(22, 2, head_size, generator=g).to(dtype) for _ in range(2))
    slots = torch.randperm(64, generator=g)[:20]
    slots[4] = -1
    ours, truth = (torch.full((2, 2, 32, fmt.slot_bytes), 0xFF, dtype=torch.uint8) for _ in range(2))
    store(key, value, ours, slots, fmt)
    reference.store(key, value, truth, slots, fmt)
    blocks, stored = torch.arange(2), slots[slots >= 0]
    for mine, theirs in zip(reference.load(ours, blocks, fmt), reference.load(truth, blocks, fmt), strict=True):
        # Of 38 vectors; a wrong layout changes all.
        assert int((mine[stored] != theirs[stored]).any(-1).sum()) <= (0 if preset == LOSSLESS_PRESET else 2)
    owned = torch.zeros_like(ours)
    write_tokens(owned, stored, torch.ones(len(stored), 2, fmt.slot_bytes, dtype=torch.uint8), fmt)
    assert bool((ours[owned == 0] == 0xFF).all())


@pytest.mark.parametrize("value", (0.0, 1e-40, 1e30, 3.38e38, float("nan"), float("inf")))
def test_store_of_hostile_values(value, seed):
    fmt = page_format("turboquant-k4v4-qjl", 64)
    x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    x[1], x[2, 0, 7] = value, value
    ours, truth = (torch.zeros(1, 1, 16, fmt.slot_bytes, dtype=torch.uint8) for _ in range(2))
    store(x, x, ours, torch.arange(4), fmt)
    reference.store(x, x, truth, torch.arange(4), fmt)
    blocks = torch.zeros(1, dtype=torch.int64)
    for mine, theirs in zip(reference.load(ours, blocks, fmt), reference.load(truth, blocks, fmt), strict=True):
        assert torch.equal(torch.isfinite(mine), torch.isfinite(theirs))
        torch.testing.assert_close(mine[[0, 3]], theirs[[0, 3]], **FP32)


@pytest.mark.parametrize("preset", ("turboquant", "turboquant-k8v4", "turboquant-k4v4-qjl"))
@pytest.mark.parametrize(("head_size", "buckets"), ((64, 3), (96, 1)))
def test_store_under_a_basis(preset, head_size, buckets, seed):
    fmt, g = page_format(preset, head_size), torch.Generator().manual_seed(seed)
    basis = random_basis(g, 2, head_size, buckets=buckets, bucket=16)
    # Two blocks' tokens: of the first two buckets, and of the last, which goes on for ever.
    starts = torch.tensor([10, 46])
    positions = (starts[:, None] + torch.arange(16)).flatten()[:20]
    key, value = (torch.randn(50, 2, head_size, generator=g) for _ in range(2))
    key, value = around_means(key, basis, sinks=13)[positions].bfloat16(), value[positions].bfloat16()
    ours, truth = (torch.zeros(2, 2, 16, fmt.slot_bytes, dtype=torch.uint8) for _ in range(2))
    store(key, value, ours, torch.arange(20), fmt, basis, positions)
    reference.store(key, value, truth, torch.arange(20), fmt, basis, positions)
    loaded = [reference.load(pages, torch.arange(2), fmt, basis, starts) for pages in (ours, truth)]
    for mine, theirs in zip(*loaded, strict=True):
        # Of 40 vectors, those with a tie that fp32 resolves otherwise: fp8 has 16 times more thresholds than 4 bits.
        assert int((mine != theirs).any(-1).sum()) <= (6 if "k8" in preset else 3)
        torch.testing.assert_close(mine, theirs, rtol=0.3, atol=0.3 * float(theirs[3:].std()))


def run(batch, max_query_len, scale, **options):
    query = batch.query.float()
    tokens, heads, d = query.shape
    out = torch.full_like(query, float("nan"))
    plan = plan_decode(len(batch.seq_lens), tokens, heads, batch.cache.shape[1], d, max_query_len)
    scratch = torch.full((plan.floats,), float("nan"))
    tensors = (batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc)
    decode(query, *tensors, out, scratch, batch.fmt, scale, max_query_len, **options)
    return out, reference.attend(query, *tensors, batch.fmt, scale, **options).float()


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("head_size", (64, 80))
def test_decode(preset, head_size, seed):
    batch = make_batch(page_format(preset, head_size), [1, 17, 0, 33], [1, 3, 1, 2], 2, 3, 16, seed)
    torch.testing.assert_close(*run(batch, 3, 0.1), **FP32)


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize(("head_size", "buckets"), ((64, 1), (96, 3)))
def test_decode_under_a_basis(preset, head_size, buckets, seed):
    basis = random_basis(torch.Generator().manual_seed(seed), 2, head_size, buckets=buckets, bucket=16)
    batch = make_batch(page_format(preset, head_size), [40, 3], [2, 1], 2, 3, 16, seed, basis=basis)
    torch.testing.assert_close(*run(batch, 2, 0.05, basis=basis), rtol=1e-3, atol=1e-4)  # logits of up to 50


@pytest.mark.parametrize("options", ({"window": 5}, {"soft_cap": 2.0}, {"sinks": True}))
def test_decode_with_window_soft_cap_and_sinks(options, seed):
    batch = make_batch(page_format("turboquant", 64), [6, 33], [1, 4], 2, 2, 32, seed)
    if "sinks" in options:
        options = {"sinks": torch.randn(4, generator=torch.Generator().manual_seed(seed))}
    torch.testing.assert_close(*run(batch, 4, 0.3, **options), **FP32)


@pytest.mark.parametrize("options", ({}, {"window": 5}, {"window": 40}, {"soft_cap": 2.0}, {"sinks": True}, {"buckets": 3}))
def test_decode_beside_recent_tokens(options, seed):
    """The decode up to ``ends`` and attention to the exact tokens from there on are the reference with both."""
    beside = RecentTokens(page_format("turboquant-k3v3", 64), 2, 3, 32, seed, **options)
    out, lse = torch.full_like(beside.query, float("nan")), torch.full(beside.query.shape[:2], float("nan"))
    plan = plan_decode(len(ENDS), *beside.query.shape[:2], 2, 64, 3)
    scratch = torch.full((plan.floats,), float("nan"))
    decode(beside.query, *beside.pages, out, scratch, beside.fmt, 0.3, 3, **beside.options, ends=beside.ends, lse=lse)
    beside.check(out, lse, 0.3, attend_recent, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("buckets", (0, 1, 3))
@pytest.mark.parametrize("preset", ALL)
def test_context_comes_back_in_the_models_basis(preset, buckets, seed):
    fmt = page_format(preset, 96)
    basis = random_basis(torch.Generator().manual_seed(seed), 2, 96, 3.0, buckets, bucket=16) if buckets else None
    batch = make_batch(fmt, [40], [1], 2, 1, 16, seed, basis=basis)
    truth = reference.load_vectors(batch.cache, batch.block_table[0, :3].long(), fmt, basis, 16 * torch.arange(3))
    ours = [torch.full((25, 2, 96), float("nan")) for _ in range(2)]
    # Three ranges: rows 1..20 get tokens from 13 on, the second range is empty, rows 21 and 22 get tokens 0 and 1.
    starts, first = torch.tensor([1, 21, 21, 23], dtype=torch.int32), torch.tensor([13, 5, 0], dtype=torch.int32)
    load_context(batch.cache, batch.block_table[:1].expand(3, -1), first, starts, 20, *ours, fmt, basis)
    for mine, whole in zip(ours, truth, strict=True):
        assert mine[:1].isnan().all() and mine[23:].isnan().all()
        torch.testing.assert_close(mine[1:23], whole[[*range(13, 33), 0, 1]].float(), **FP32)
