"""The CUDA store's own sources, run on the CPU over an emulated warp, against the float64 reference."""

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.cuda.variant import HEAD_SIZES
from vllm_turboquant.kernels.format import page_format

from . import emulated
from .oracle import around_means, random_basis
from .test_cuda_emulated import BF16, COVERED, FP16

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")
HEADS = 3


def stored(fmt, seed, *, dtype=BF16, tokens=29, block_size=32, basis=None, edit=None, skipped=(3, 9), positions=None):
    """The same tokens stored by the kernel and by the reference into 0xFF pages that are a padded view. Returns both caches and
    the slots."""
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(tokens + 2, HEADS + 1, fmt.head_size + 8, generator=g) for _ in range(2))
    key, value = key[:, :HEADS, : fmt.head_size], value[:, 1:, 8:]
    if basis is not None:
        key = around_means(key, basis, sinks=3)
    sides = []
    for side in (key, value):
        side = side.to(dtype)
        if edit is not None:
            edit(side)
        sides.append(side)
    blocks = tokens // block_size + 2
    slots = torch.randperm(blocks * block_size, generator=g)[:tokens]
    slots[list(skipped)] = -1
    where = torch.arange(tokens) if positions is None else positions
    caches = []
    for store in (emulated.store, reference.store):
        pool = torch.full((blocks, HEADS + 1, block_size * fmt.slot_bytes), 0xFF, dtype=torch.uint8)
        cache = pool[:, :HEADS].unflatten(2, (block_size, fmt.slot_bytes))
        store(*(side[:tokens] for side in sides), cache, slots, fmt, basis, where)
        caches.append(pool)
    return caches, slots


def differing(caches, fmt, block_size=32):
    """How many vectors, of keys or values, are not the reference's bits; none may be far from it."""
    mine, truth = (pool[:, :HEADS].unflatten(2, (block_size, fmt.slot_bytes)) for pool in caches)
    assert all((pool[:, HEADS:] == 0xFF).all() for pool in caches), "bytes of no head are left alone"
    count, blocks = 0, torch.arange(mine.shape[0])
    for a, b in zip(reference.load(mine, blocks, fmt), reference.load(truth, blocks, fmt), strict=True):
        assert torch.equal(a.isnan(), b.isnan()), "slots of no token are left alone"
        a, b = a.nan_to_num(), b.nan_to_num()
        other = (a != b).any(-1)
        count += int(other.sum())
        # A flipped tie moves a coordinate by a step, or all of them by that of the scale.
        assert not other.any() or ((a - b).norm(dim=-1) / b.norm(dim=-1))[other].max() < 0.5
    return count


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_bytes_are_the_references(preset, head_size, dtype, seed):
    """But where two choices are closer than fp32 rounding, as in the portable store: of 162 vectors, 1 in 100 would be a bug."""
    fmt = page_format(preset, head_size)
    caches, _ = stored(fmt, seed, dtype=dtype)
    assert differing(caches, fmt) <= 2


@pytest.mark.parametrize("buckets", (1, 4))
@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_under_a_key_basis(preset, head_size, dtype, buckets, seed):
    """Means 30 times the keys' size; three tokens around that of first tokens. Of 354 vectors, 1 in 50."""
    g = torch.Generator().manual_seed(seed)
    basis = random_basis(g, HEADS, head_size, buckets=buckets, bucket=16)
    fmt = page_format(preset, head_size)
    caches, _ = stored(fmt, seed, dtype=dtype, tokens=61, basis=basis)
    assert differing(caches, fmt) <= 7


@pytest.mark.parametrize("tokens", (0, 1, 7, 8, 9, 17))
@pytest.mark.parametrize("block_size", (16, 32, 64))
def test_any_number_of_tokens(tokens, block_size, seed):
    fmt = page_format("turboquant", 64)
    caches, _ = stored(fmt, seed, tokens=tokens, block_size=block_size, skipped=(0,) if tokens == 9 else ())
    assert differing(caches, fmt, block_size) <= 1


def test_padding_has_no_position(seed):
    """Rows that are not stored may have any position."""
    fmt = page_format("turboquant", 64)
    basis = random_basis(torch.Generator().manual_seed(seed), HEADS, 64, buckets=3, bucket=16)
    positions = torch.arange(29)
    wild = positions.clone()
    wild[3], wild[9] = -(2**62), 2**62
    (mine, _), _ = stored(fmt, seed, basis=basis, positions=wild)
    (truth, _), _ = stored(fmt, seed, basis=basis, positions=positions)
    assert torch.equal(mine, truth)


@pytest.mark.parametrize("preset", COVERED)
@pytest.mark.parametrize("basis", (False, True))
@pytest.mark.parametrize("value", (0.0, 1e-40, 3e-8, 1e30, 3.38e38, float("nan"), float("inf"), float("-inf")))
def test_hostile_values(preset, basis, value, seed):
    """What is stored is finite exactly where the reference's is, and no other token changes a bit."""
    fmt = page_format(preset, 128)
    basis = random_basis(torch.Generator().manual_seed(seed), HEADS, 128) if basis else None

    def edit(x):
        x[5] = value
        x[6, :, 17] = value

    (clean, _), slots = stored(fmt, seed, basis=basis)
    (ours, truth), _ = stored(fmt, seed, basis=basis, edit=edit)
    live = slots[slots >= 0]
    other = live[(live != slots[5]) & (live != slots[6])]
    views = [pool[:, :HEADS].unflatten(2, (32, fmt.slot_bytes)) for pool in (ours, truth, clean)]
    for mine, theirs, before in zip(*(reference.load(v, torch.arange(len(v)), fmt) for v in views), strict=True):
        assert torch.equal(torch.isfinite(mine[live]), torch.isfinite(theirs[live]))
        assert torch.equal(mine[other], before[other])
