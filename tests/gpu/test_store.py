"""Both store kernels, portable and CUDA, against the float64 reference, in every preset, head size and dtype."""

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.basis import by_head
from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format
from vllm_turboquant.kernels.rotation import rotation

from ..kernels.oracle import around_means, random_basis

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = ("portable", "cuda")
BLOCK = 32
pytestmark = pytest.mark.gpu


def kernel_of(which, fmt, dtype, basis=None):
    """The store of that name; skips what the CUDA store does not cover."""
    from vllm_turboquant.kernels import store as portable
    from vllm_turboquant.kernels.cuda import store as cuda
    from vllm_turboquant.kernels.cuda.variant import supported_pages

    if which == "portable":
        return portable.store
    if not supported_pages(fmt, BLOCK) or dtype == torch.float32:
        pytest.skip("not covered")
    assert cuda.prepare(torch.device("cuda", torch.cuda.current_device()), fmt, BLOCK, dtype, basis)
    return cuda.store


def both(which, fmt, dtype, seed, tokens=512, edit=None):
    """The same tokens stored by the kernel and by the reference into 0xFF pages; returns both caches and the vectors."""
    store = kernel_of(which, fmt, dtype)
    g = torch.Generator().manual_seed(seed)
    heads, block_size = 3, BLOCK
    vectors = [torch.randn(tokens + 2, heads, fmt.head_size, generator=g).to("cuda", dtype) for _ in range(2)]
    if edit is not None:
        for x in vectors:
            edit(x)
    blocks = tokens // block_size + 2
    slots = torch.randperm(blocks * block_size, generator=g)[:tokens].cuda()
    slots[3] = -1
    caches = [torch.full((blocks, heads, block_size, fmt.slot_bytes), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(2)]
    store(*vectors, caches[0], slots, fmt)
    reference.store(*vectors, caches[1], slots, fmt)
    return caches, vectors, slots


def tokens_of(cache, slots, fmt):
    """Decoded keys and values ``[T, H, d]`` of the stored slots, rotated basis."""
    live = slots[slots >= 0]
    return [side[live] for side in reference.load(cache, torch.arange(cache.shape[0], device="cuda"), fmt)]


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("preset", (*PRESETS, LOSSLESS_PRESET))
@pytest.mark.parametrize("head_size", (64, 80, 96, 112, 128, 160, 192, 256, 512, 576))
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_references(which, preset, head_size, dtype, seed):
    """Bytes differ only where two choices are closer than fp32 rounding: rarely, and never for the worse."""
    fmt = page_format(preset, head_size)
    (ours, truth), _, slots = both(which, fmt, dtype, seed)
    differing = float((ours != truth).float().mean())
    print(f"{preset} d={head_size} {dtype}: {differing:.2e} of bytes differ")
    if preset == LOSSLESS_PRESET:
        assert differing == 0
    for mine, theirs in zip(tokens_of(ours, slots, fmt), tokens_of(truth, slots, fmt), strict=True):
        other = (mine != theirs).any(-1)
        # A vector differs by a tie in a code, in the scale's last bit or in the candidate. 1 in 100 would be a bug.
        assert float(other.float().mean()) < 0.01
        # One ulp of fp16 is 2**-10; a flipped tie moves a coordinate of a vector by a step, of which there are few.
        gap = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert gap.max() < 0.5


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_size", (64, 96, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
def test_under_a_key_basis(which, preset, head_size, dtype, seed):
    """Keys around means 30 times their size, by position. In the stored basis, where the transform does not weigh errors."""
    fmt, g, tokens = page_format(preset, head_size), torch.Generator().manual_seed(seed), 512
    basis = random_basis(g, 2, head_size, buckets=5, bucket=48)
    store = kernel_of(which, fmt, dtype, basis)
    key, value = (torch.randn(tokens, 2, head_size, generator=g) for _ in range(2))
    key, value = around_means(key, basis, sinks=3).to("cuda", dtype), value.to("cuda", dtype)
    basis, slots = basis.to(key.device), torch.arange(tokens, device="cuda")
    ours, truth = (torch.full((tokens // 32, 2, 32, fmt.slot_bytes), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(2))
    store(key, value, ours, slots, fmt, basis, slots)
    reference.store(key, value, truth, slots, fmt, basis, slots)
    starts = slots[::32]
    mine, theirs = (reference.load(x, starts // 32, fmt, basis, starts)[0] for x in (ours, truth))
    differing = float((mine != theirs).any(-1).float().mean())
    print(f"{preset} d={head_size} {dtype}: {differing:.2e} of keys differ")
    # 8 bits have 16 times more thresholds than 4, and no scale search to hide behind.
    assert differing < (0.05 if "k8" in preset else 0.02)
    exact = by_head(key.double() - basis.means[:, 0].double(), basis.forward.mT)
    assert ((mine - exact) ** 2).sum() <= ((theirs - exact) ** 2).sum() * (1 + 1e-3)


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_size", (64, 96, 128, 256))
def test_distortion_is_the_references(which, preset, head_size, seed):
    """Against the vectors themselves, so that ties cannot hide a loss; 1e-4 relative covers flipped ties."""
    fmt = page_format(preset, head_size)
    (ours, truth), vectors, slots = both(which, fmt, torch.bfloat16, seed)
    live = (slots >= 0).nonzero().squeeze(-1)
    turn = rotation(head_size).cuda()
    mine, theirs = tokens_of(ours, slots, fmt), tokens_of(truth, slots, fmt)
    for x, a, b in zip(vectors, mine, theirs, strict=True):
        y = x[live].double() @ turn.T
        assert ((a - y) ** 2).sum() <= ((b - y) ** 2).sum() * (1 + 1e-4)


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("value", (0.0, 1e-40, 3e-8, 1e30, 3.38e38, float("nan"), float("inf"), float("-inf")))
def test_hostile_values(which, preset, dtype, value, seed):
    """Two hostile tokens: what is stored is finite exactly where the reference's is, and no other token changes a bit."""
    fmt = page_format(preset, 128)

    def edit(x):
        x[5] = value
        x[6, :, 17] = value

    (clean, _), _, slots = both(which, fmt, dtype, seed, tokens=64)
    (ours, truth), _, _ = both(which, fmt, dtype, seed, tokens=64, edit=edit)
    other = (slots != slots[5]) & (slots != slots[6])
    for mine, theirs, before in zip(*(tokens_of(c, slots, fmt) for c in (ours, truth, clean)), strict=True):
        assert torch.equal(torch.isfinite(mine), torch.isfinite(theirs))
        assert torch.equal(mine[other[slots >= 0]], before[other[slots >= 0]])


@pytest.mark.parametrize("which", KERNELS)
def test_pages_beyond_two_gigabytes(which):
    fmt = page_format("turboquant", 128)
    store = kernel_of(which, fmt, torch.bfloat16)
    heads, block_size = 8, BLOCK
    block_bytes = heads * block_size * fmt.slot_bytes
    blocks = (2**32 + 2**28) // block_bytes
    cache = torch.full((blocks, heads, block_size, fmt.slot_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    x = torch.randn(block_size, heads, 128, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(block_size, device="cuda") + (blocks - 1) * block_size
    store(x, x, cache, slots, fmt)
    small = torch.zeros(1, heads, block_size, fmt.slot_bytes, dtype=torch.uint8, device="cuda")
    store(x, x, small, torch.arange(block_size, device="cuda"), fmt)
    assert torch.equal(cache[-1], small[0])
    assert bool((cache[:-1].view(torch.int32) == -1).all())
