"""The CUDA context loader's own sources, run on the CPU over an emulated warp, against the float64 reference."""

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.cuda.variant import HEAD_SIZES
from vllm_turboquant.kernels.format import page_format

from . import emulated
from .oracle import make_batch
from .test_cuda_emulated import BF16, COVERED, FP16

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")
# Decoded exactly, up to fp32 sums, then rounded once: half a step of 8 and of 11 bits.
ROUNDING = {BF16: 2**-8, FP16: 2**-11}
PAD = 2


def workspaces(rows, heads, head_size, dtype):
    """Keys and values full of 7, with rows before and after and, as views, dims beyond the heads'."""
    whole = (torch.full((rows + 2 * PAD, heads + 1, head_size + 8), 7.0, dtype=dtype) for _ in range(2))
    return [side[:, :heads, :head_size] for side in whole]


def matrix_rounding(batch, pages, dtype, basis):
    """What rounding a basis's matrix to fp16 may change in keys: each entry by half a step of 11 bits. For fp16 keys its
    rest is added."""
    images = reference.load(batch.cache, pages, batch.fmt)[0]
    if basis is None or dtype == FP16:
        return torch.zeros_like(images)
    return 2**-11 * torch.einsum("thi,hji->thj", images.abs(), basis.inverse.double().abs())


def check(batch, firsts, counts, dtype, longest=None, basis=None):
    """Every range against the reference; nothing else is written, and dead entries of the table are never looked up."""
    fmt, heads, block_size = batch.fmt, *batch.cache.shape[1:3]
    starts = torch.tensor([PAD, *counts]).cumsum(0).to(torch.int32)
    total = sum(counts)
    table = torch.full_like(batch.block_table, 2**30)
    for r, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        pages = slice(first // block_size, -(-(first + count) // block_size) if count else 0)
        table[r, pages] = batch.block_table[r, pages]
    key, value = workspaces(total, heads, fmt.head_size, dtype)
    first = torch.tensor(firsts, dtype=torch.int32)
    emulated.load_context(batch.cache, table, first, starts, longest or max(counts), key, value, fmt, basis)
    for r, (begin, count) in enumerate(zip(firsts, counts, strict=True)):
        pages = batch.block_table[r, : -(-(begin + count) // block_size)].long()
        rows = slice(int(starts[r]), int(starts[r]) + count)
        keys, values = reference.load_vectors(batch.cache, pages, fmt, basis, block_size * torch.arange(len(pages)))
        for mine, truth, slack in ((key, keys, matrix_rounding(batch, pages, dtype, basis)), (value, values, 0 * values)):
            if count:
                expected = truth[begin : begin + count]
                excess = (mine[rows].double() - expected).abs() - ROUNDING[dtype] * expected.abs() - slack[begin : begin + count]
                assert excess.max() < 1e-6 * expected.abs().max(), (r, begin, count)
    for side in (key, value):
        base = side._base
        assert (base[:PAD] == 7).all() and (base[total + PAD :] == 7).all(), "rows of no range are left alone"
        assert (base[:, heads:] == 7).all() and (base[..., fmt.head_size :] == 7).all(), "dims of no head are left alone"
    return key, value


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_every_format(preset, head_size, dtype, seed):
    """Ranges that begin and end anywhere in units and pages; an empty one; a longest that is only a bound."""
    batch = make_batch(page_format(preset, head_size), [90] * 6, [1] * 6, 2, 1, 32, seed)
    check(batch, [0, 17, 9, 31, 15, 48], [90, 1, 0, 50, 2, 33], dtype, longest=100)


@pytest.mark.parametrize("block_size", (16, 32, 64))
@pytest.mark.parametrize("longest", (1, 2, 15, 16, 17, 18, 31, 33))
def test_the_grid_covers_every_offset(longest, block_size, seed):
    batch = make_batch(page_format("turboquant", 64), [80] * 16, [1] * 16, 1, 1, block_size, seed)
    check(batch, list(range(16)), [longest] * 16, BF16)


def test_nothing_to_do(seed):
    batch = make_batch(page_format("turboquant", 64), [20], [1], 1, 1, 16, seed)
    for longest in (0, 40):
        check(batch, [3], [0], BF16, longest=longest)


def test_poison_changes_nothing(seed):
    """Neither other tokens of a unit, NaN scales among them, nor other bytes of the pool."""
    outs = []
    for poison in (0xFF, 0):
        batch = make_batch(page_format("turboquant", 128), [37, 5], [1, 1], 2, 1, 32, seed, poison)
        outs += check(batch, [30, 0], [7, 5], BF16)
    assert all(torch.equal(a[PAD:-PAD], b[PAD:-PAD]) for a, b in zip(outs[:2], outs[2:], strict=True))


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("kind", (0, 1))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_broken_token_is_nan_and_no_other(head_size, kind, dtype, seed):
    fmt = page_format("turboquant", head_size)
    batch = make_batch(fmt, [48], [1], 1, 1, 16, seed)
    units = torch.as_strided(
        batch.cache, (batch.cache.shape[0], fmt.unit_bytes), (batch.cache.stride(0), 1), batch.cache.storage_offset()
    )
    for token, group in ((8, 0), (21, fmt.groups - 1)):
        at = fmt.scalar_offset(token % 16, group, kind)
        units[int(batch.block_table[0, token // 16]), at : at + 2] = 0xFF
    key, value = workspaces(40, 1, head_size, dtype)
    first, starts = torch.tensor([5], dtype=torch.int32), torch.tensor([PAD, PAD + 40], dtype=torch.int32)
    emulated.load_context(batch.cache, batch.block_table, first, starts, 40, key, value, fmt)
    broken, whole = (key, value) if kind == 0 else (value, key)
    rows = [PAD + 8 - 5, PAD + 21 - 5]
    assert broken[rows].isnan().all() and torch.isfinite(whole).all()
    assert broken.isnan().sum() == 2 * head_size
