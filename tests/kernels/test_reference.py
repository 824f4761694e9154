"""The vectorised reference against an independent oracle over the decoded cache, amid poisoned bytes."""

import pytest
import torch

from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format
from vllm_turboquant.kernels.packing import pack_plane, read_tokens, unit_view, unpack_plane, write_tokens
from vllm_turboquant.kernels.reference import attend, load, store

from .oracle import Batch, attend_slowly, make_batch

# float64 against float64: only the order of sums differs.
ROUNDING = {"rtol": 1e-9, "atol": 1e-11}


def run(batch: Batch, scale: float, **options) -> torch.Tensor:
    return attend(batch.query, batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.fmt, scale, **options)


@pytest.mark.parametrize("preset", (*PRESETS, LOSSLESS_PRESET))
@pytest.mark.parametrize("head_size", (64, 80, 256))
def test_attention_over_the_decoded_cache(preset, head_size, seed):
    batch = make_batch(page_format(preset, head_size), [1, 15, 16, 17, 40], [1, 3, 1, 2, 5], 2, 3, 16, seed)
    torch.testing.assert_close(run(batch, head_size**-0.5), attend_slowly(batch, head_size**-0.5), **ROUNDING)


@pytest.mark.parametrize("block_size", (16, 32, 128))
@pytest.mark.parametrize("options", ({"window": 1}, {"window": 7}, {"window": 33}, {"soft_cap": 2.0}, {"sinks": True}))
def test_window_soft_cap_and_sinks(block_size, options, seed):
    batch = make_batch(page_format("turboquant", 64), [5, 33, 34, 70], [5, 1, 4, 8], 2, 2, block_size, seed)
    if "sinks" in options:
        options = {"sinks": torch.randn(4, generator=torch.Generator().manual_seed(seed))}
    torch.testing.assert_close(run(batch, 0.3, **options), attend_slowly(batch, 0.3, **options), **ROUNDING)


def test_long_prefills_are_attended_in_pieces(seed):
    batch = make_batch(page_format("turboquant-k2v2", 16), [600], [600], 1, 1, 32, seed)
    whole = run(batch, 0.25)
    tail = Batch(**{**batch.__dict__, "query": batch.query[-1:], "query_start_loc": torch.tensor([0, 1])})
    torch.testing.assert_close(whole[-1:], run(tail, 0.25), **ROUNDING)
    head = Batch(
        **{
            **batch.__dict__,
            "query": batch.query[:40],
            "query_start_loc": torch.tensor([0, 40]),
            "seq_lens": torch.tensor([40]),
        }
    )
    torch.testing.assert_close(whole[:40], attend_slowly(head, 0.25), **ROUNDING)


@pytest.mark.parametrize("preset", (*PRESETS, LOSSLESS_PRESET))
@pytest.mark.parametrize("window", (None, 20))
def test_bytes_that_a_request_does_not_own_never_matter(preset, window, seed):
    """Free blocks, padding, rows past the length and table entries past the length: 0xFF against 0, bit for bit."""
    fmt = page_format(preset, 96)
    poisoned, clean = (
        run(make_batch(fmt, [0, 1, 17, 50, 64], [0, 1, 2, 4, 1], 2, 2, 32, seed, poison=p), 0.1, window=window) for p in (0xFF, 0)
    )
    assert torch.equal(poisoned, clean)
    assert torch.isfinite(poisoned).all()


def test_dead_rows_are_zero(seed):
    batch = make_batch(page_format("turboquant", 64), [0, 20, 0], [1, 2, 3], 1, 2, 16, seed)
    out = run(batch, 0.1)
    assert not out[0].any() and not out[3:].any() and out[1:3].any()


@pytest.mark.parametrize("preset", (*PRESETS, LOSSLESS_PRESET))
def test_stores_write_only_the_bytes_of_their_tokens(preset, seed):
    fmt = page_format(preset, 112)
    batch = make_batch(fmt, [40], [1], 2, 1, 16, seed)
    pool = torch.empty(0, dtype=torch.uint8).set_(batch.cache.untyped_storage())
    before = pool.clone()
    slots = torch.tensor([3 * 16 + 5, -1, 1 * 16 + 15, 0])
    x = torch.randn(6, 2, 112, generator=torch.Generator().manual_seed(seed))  # two more vectors than slots
    store(x, -x, batch.cache, slots, fmt)
    changed = (pool != before).nonzero().flatten()
    owned = torch.zeros_like(pool, dtype=torch.bool)
    marks = owned.as_strided(batch.cache.shape, batch.cache.stride(), batch.cache.storage_offset())
    payload = torch.ones(3, 2, fmt.slot_bytes, dtype=torch.uint8)
    write_tokens(marks.view(torch.uint8), slots[slots >= 0], payload, fmt)
    assert owned[changed].all() and len(changed) > fmt.slot_bytes
    assert int(owned.sum()) == 3 * 2 * fmt.slot_bytes


def test_a_token_is_stored_alike_alone_and_in_company(seed):
    """Chunked prefill, prefix hits and preemption must give the same bytes."""
    fmt = page_format("turboquant-k3v3", 128)
    x = torch.randn(48, 2, 128, generator=torch.Generator().manual_seed(seed))
    together, apart = (torch.zeros(3, 2, 16, fmt.slot_bytes, dtype=torch.uint8) for _ in range(2))
    store(x, x, together, torch.arange(48), fmt)
    for token in torch.randperm(48, generator=torch.Generator().manual_seed(seed)):
        store(x[token][None], x[token][None], apart, token[None], fmt)
    assert torch.equal(together, apart)


def test_the_lossless_codec_is_lossless(seed):
    fmt = page_format(LOSSLESS_PRESET, 80)
    g = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        k, v = (torch.randn(32, 3, 80, generator=g).to(dtype) for _ in range(2))
        cache = torch.full((2, 3, 16, fmt.slot_bytes), 0xFF, dtype=torch.uint8)
        store(k, v, cache, torch.arange(32), fmt)
        keys, values = load(cache, torch.arange(2), fmt, dtype=torch.float32)
        assert torch.equal(keys.to(dtype), k) and torch.equal(values.to(dtype), v)


def test_a_non_finite_token_reaches_only_rows_that_see_it(seed):
    batch = make_batch(page_format("turboquant", 64), [40], [8], 2, 2, 16, seed)
    clean = run(batch, 0.125)
    position = 36  # rows 0..3 are positions 32..35 and cannot see it
    slot = batch.block_table[0, position // 16].to(torch.int64) * 16 + position % 16
    broken = batch.keys[0][position][None].clone()
    broken[..., 5] = float("nan")
    store(broken, broken, batch.cache, slot[None], batch.fmt)
    out = run(batch, 0.125)
    assert torch.equal(out[:4], clean[:4]) and out[4:].isnan().all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_size", (16, 64, 80, 112, 128, 192, 256, 576))
def test_packing_inverts(preset, head_size, seed):
    """All codes, both token parities, every plane."""
    fmt = page_format(preset, head_size)
    for planes, codec in ((fmt.key_planes, fmt.preset.key), (fmt.value_planes, fmt.preset.value)):
        if not codec.scaled:
            continue
        top = 1 << (codec.bits + codec.sketch)
        codes = torch.randint(0, top, (64, head_size), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        codes.view(-1)[:top] = torch.arange(top, dtype=torch.int32)
        odd = torch.arange(64) % 2
        back = torch.stack([unpack_plane(p, pack_plane(p, codes, odd), odd) for p in planes]).sum(0)
        assert torch.equal(back.to(torch.int32), codes)


def test_pages_with_gaps_inside_a_head_are_refused():
    fmt = page_format("turboquant", 64)
    gapped = torch.zeros(2, 1, 16, 2 * fmt.slot_bytes, dtype=torch.uint8)[..., : fmt.slot_bytes]
    with pytest.raises(AssertionError):
        unit_view(gapped, fmt)
    with pytest.raises(AssertionError):
        unit_view(torch.zeros(2, 1, 24, fmt.slot_bytes, dtype=torch.uint8), fmt)
    with pytest.raises(AssertionError):
        read_tokens(torch.zeros(2, 1, 16, 132, dtype=torch.uint8), torch.tensor([0]), fmt)
