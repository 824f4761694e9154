"""The CUDA decode's own sources, run on the CPU over an emulated warp, against the float64 reference."""

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.cuda.variant import BITS, HEAD_SIZES, Tuning
from vllm_turboquant.kernels.format import PRESETS, page_format

from . import emulated
from .oracle import make_batch

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")
COVERED = [name for name, preset in PRESETS.items() if (preset.key.bits, preset.value.bits) in BITS and not preset.key.sketch]
LENGTHS = [5, 16, 17, 33, 0, 64, 300]
BF16, FP16 = torch.bfloat16, torch.float16
# Weights and output rounded to 8 bits each; to 11, and the query too.
TOLERANCE = {BF16: 2**-8, FP16: 2**-10}


def check_winners(batch, basis=None):
    """Queries so large that one token takes all the weight: any whose score is the best to the query's 11 bits, doubled."""
    query = batch.query.to(BF16)
    out, group = emulated.decode(batch, query, 0.1, 1, basis=basis), query.shape[1] // batch.cache.shape[1]
    for r, length in enumerate(batch.seq_lens.tolist()):
        blocks = batch.block_table[r, : -(-length // batch.cache.shape[2])].long()
        keys, values = (x[:length] for x in reference.load_vectors(batch.cache, blocks, batch.fmt, basis))
        for head, (q, row) in enumerate(zip(query[r].double(), out[r].double(), strict=True)):
            scores = keys[:, head // group] @ q
            near = values[scores >= scores.max() - 2**-10 * (scores.max() - scores.min()), head // group]
            # Nothing averages out: the weight's rounding and the output's add up.
            error = float(((near - row).norm(dim=-1) / near.norm(dim=-1)).min())
            assert error < 2 * TOLERANCE[BF16], (r, head, error)


def check(batch, dtype, scale, max_query_len, grid=5, tuning=emulated.SMALL, slack=1, **options):
    query = batch.query.to(dtype)
    out = emulated.decode(batch, query, scale, max_query_len, grid=grid, tuning=tuning, **options)
    truth = reference.attend(
        query.double(), batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.fmt, scale, **options
    )
    for r, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(*batch.query_start_loc[r : r + 2].tolist())
        if length == 0:
            assert not out[rows].any()
        elif rows.stop > rows.start:
            error = float((out[rows].double() - truth[rows]).norm() / truth[rows].norm())
            assert error < slack * TOLERANCE[dtype], (r, length, error)
    return out


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_every_format(preset, head_size, dtype, seed):
    batch = make_batch(page_format(preset, head_size), LENGTHS, [1] * 7, 2, 4, 32, seed)
    check(batch, dtype, head_size**-0.5, 1)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_every_format_as_other_cards_read_it(preset, head_size, seed):
    """Without bulk copies and the instruction that widens levels, with fewer registers."""
    batch = make_batch(page_format(preset, head_size), LENGTHS, [1] * 7, 2, 4, 32, seed)
    check(batch, BF16, head_size**-0.5, 1, tuning=Tuning(2, 2, 2, False))


@pytest.mark.parametrize("block_size", (16, 32, 64))
@pytest.mark.parametrize(("group", "query_lens"), ((1, 1), (3, 1), (7, 1), (16, 1), (2, 3), (4, 5), (7, 8)))
def test_shapes(group, query_lens, block_size, seed):
    """Query lengths 1 to the largest, ragged; more rows than one MMA tile, and than one CTA, holds."""
    queries = [1 + i % query_lens for i in range(7)]
    batch = make_batch(page_format("turboquant", 128), [max(n, 8) for n in LENGTHS], queries, 2, group, block_size, seed)
    check(batch, BF16, 0.1, query_lens)


@pytest.mark.parametrize("options", ({"window": 1}, {"window": 20}, {"window": 100}, {"soft_cap": 2.0}, {"sinks": BF16}))
@pytest.mark.parametrize("head_size", (128, 256))
@pytest.mark.parametrize("query_len", (1, 3))
def test_window_soft_cap_and_sinks(options, query_len, head_size, seed):
    batch = make_batch(page_format("turboquant", head_size), [20, 33, 300], [query_len] * 3, 2, 4, 16, seed)
    if "window" in options:  # pages before the window are never looked up
        for r, length in enumerate((20, 33, 300)):
            batch.block_table[r, : max(0, length - query_len - options["window"] + 1) // 16] = -1
    if "sinks" in options:
        options = {"sinks": torch.randn(8).to(options["sinks"])}
    check(batch, BF16, 0.3, query_len, **options)


@pytest.mark.parametrize("tuning", (Tuning(8, 2, 2, True), Tuning(4, 2, 3, False), Tuning(2, 1, 1, False)))
@pytest.mark.parametrize("grid", (1, 3, 40))
def test_any_grid_and_tuning(grid, tuning, seed):
    batch = make_batch(page_format("turboquant", 128), [100, 1000, 1, 0, 40], [1] * 5, 2, 4, 16, seed)
    check(batch, BF16, 0.1, 1, grid=grid, tuning=tuning)


def test_equal_lengths_share_evenly(seed):
    batch = make_batch(page_format("turboquant", 64), [400] * 3, [1] * 3, 2, 4, 16, seed)
    check(batch, BF16, 0.1, 1, grid=11)


@pytest.mark.parametrize("query_len", (1, 3))
def test_poison_changes_nothing(query_len, seed):
    fmt = page_format("turboquant", 128)
    batches = [make_batch(fmt, [5, 33, 64], [query_len] * 3, 2, 4, 32, seed, poison) for poison in (0xFF, 0)]
    outs = [emulated.decode(b, b.query.to(BF16), 0.1, query_len) for b in batches]
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("kind", (0, 1))
@pytest.mark.parametrize("options", ({}, {"window": 10}))
def test_a_broken_token_reaches_exactly_the_rows_that_see_it(options, kind, dtype, seed):
    fmt = page_format("turboquant", 128)
    batch = make_batch(fmt, [40], [3], 1, 2, 16, seed)
    units = torch.as_strided(batch.cache, (batch.cache.shape[0], fmt.unit_bytes), (batch.cache.stride(0), 1))
    for token in (38, 26):  # seen by the last two rows; by none under the window
        if token == 26 and not options:
            continue
        at = fmt.scalar_offset(token % 16, 0, kind)
        units[int(batch.block_table[0, token // 16]), at : at + 2] = 0xFF
    out = emulated.decode(batch, batch.query.to(dtype), 0.1, 3, **options)
    assert torch.isfinite(out[0]).all() and out[1:].isnan().all()


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("power", (-30, -8, 8))
def test_scales_of_any_size(power, dtype, seed):
    """Value scales at both ends of fp16, one outlier among them."""
    fmt = page_format("turboquant", 128)
    batch = make_batch(fmt, [200], [1], 1, 4, 16, seed)
    units = torch.as_strided(batch.cache, (batch.cache.shape[0], fmt.unit_bytes), (batch.cache.stride(0), 1))
    factor = 2.0**power if power > -20 else 2.0**-12
    for position in range(200):
        at = fmt.scalar_offset(position % 16, 0, 1)
        scale = units[int(batch.block_table[0, position // 16]), at : at + 2]
        value = float(scale.clone().view(torch.float16)[0]) * factor
        scale.copy_(torch.tensor([60000.0 if position == 7 and power > 0 else value], dtype=torch.float16).view(torch.uint8))
    check(batch, dtype, 0.1, 1)


@pytest.mark.parametrize("factor", (0.0, 1e-38, 1e-6, 1e5, 1e30))
def test_queries_of_any_size(factor, seed):
    batch = make_batch(page_format("turboquant", 128), [50, 200], [1, 1], 1, 4, 16, seed)
    batch.query *= factor
    if factor > 1:
        check_winners(batch)
    else:
        check(batch, BF16, 0.1, 1)
