"""The CUDA kernels under key bases, run on the CPU over an emulated warp, against the float64 reference."""

import pytest
import torch

from vllm_turboquant.kernels.basis import KeyBasis
from vllm_turboquant.kernels.cuda.variant import HEAD_SIZES, Tuning
from vllm_turboquant.kernels.format import page_format

from . import emulated
from .oracle import make_batch
from .test_basis import HEADS, random_basis
from .test_cuda_emulated import BF16, COVERED, FP16, LENGTHS, check

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture
def rng(seed):
    return torch.Generator().manual_seed(seed)


def centred(basis):
    return KeyBasis(basis.forward, basis.inverse, torch.zeros_like(basis.mean))


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_decode_in_every_format(preset, head_size, dtype, rng, seed):
    basis = random_basis(rng, head_size)
    batch = make_batch(page_format(preset, head_size), LENGTHS, [1] * 7, HEADS, 4, 32, seed, basis=basis)
    check(batch, dtype, head_size**-0.5, 1, basis=basis)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize(("group", "query_lens"), ((1, 1), (6, 1), (16, 1), (4, 3)))
def test_decode_of_every_shape(group, query_lens, head_size, rng, seed):
    """More rows than one MMA tile, and than one CTA, holds."""
    basis = random_basis(rng, head_size)
    queries = [1 + i % query_lens for i in range(7)]
    fmt, lengths = page_format("turboquant", head_size), [max(n, 8) for n in LENGTHS]
    batch = make_batch(fmt, lengths, queries, HEADS, group, 16, seed, basis=basis)
    check(batch, BF16, head_size**-0.5, query_lens, basis=basis)


@pytest.mark.parametrize("options", ({"window": 20}, {"window": 100}, {"soft_cap": 2.0}, {"sinks": BF16}))
@pytest.mark.parametrize("query_len", (1, 3))
def test_decode_with_window_soft_cap_and_sinks(options, query_len, rng, seed):
    """Soft cap and sinks see a constant that is added to all logits: only bases without a mean go with them."""
    basis = random_basis(rng, 128)
    if "window" not in options:
        basis = centred(basis)
    if "sinks" in options:
        options = {"sinks": torch.randn(4 * HEADS, generator=rng).to(options["sinks"])}
    batch = make_batch(page_format("turboquant", 128), [20, 33, 300], [query_len] * 3, HEADS, 4, 16, seed, basis=basis)
    check(batch, BF16, 0.1, query_len, basis=basis, **options)


@pytest.mark.parametrize("tuning", (Tuning(8, 2, 2, True), Tuning(4, 2, 3, False), Tuning(2, 1, 1, False)))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_decode_with_any_tuning(tuning, head_size, rng, seed):
    """Warps that have no tile of the matrix, and several."""
    basis = random_basis(rng, head_size)
    batch = make_batch(page_format("turboquant", head_size), [100, 700, 1, 0, 40], [1] * 5, HEADS, 4, 16, seed, basis=basis)
    check(batch, BF16, 0.1, 1, grid=3, tuning=tuning, basis=basis)


@pytest.mark.parametrize("dtype", (BF16, FP16))
def test_decode_of_keys_and_queries_that_the_basis_fits(dtype, rng, seed):
    """Keys and queries whose images are isotropic: in the model's basis both are far from that."""
    d, tokens = 128, 300
    basis = random_basis(rng, d)
    fmt = page_format("turboquant", d)
    batch = make_batch(fmt, [tokens], [2], HEADS, 4, 16, seed, basis=basis)
    from vllm_turboquant.kernels.reference import store

    at = torch.arange(tokens)
    slots = batch.block_table[0, at // 16].long() * 16 + at % 16
    keys = torch.einsum("hij,thj->thi", basis.inverse.double(), torch.randn(tokens, HEADS, d, generator=rng).double())
    store(keys + basis.mean, batch.values[0], batch.cache, slots, fmt, basis)
    images = batch.query.unflatten(1, (HEADS, 4))
    batch.query = torch.einsum("hij,thgi->thgj", basis.forward.double(), images).flatten(1, 2)
    check(batch, dtype, d**-0.5, 2, basis=basis)


@pytest.mark.parametrize("size", (0.0, 1e-30, 1e-6, 1e5, 1e30))
@pytest.mark.parametrize("basis_size", (2.0**-20, 1.0, 2.0**20))
def test_queries_and_bases_of_any_size(basis_size, size, rng, seed):
    """Keys as large as the basis says they are, so that codes stay what they were."""
    plain = random_basis(rng, 128)
    basis = KeyBasis(plain.forward / basis_size, plain.inverse * basis_size, torch.zeros_like(plain.mean))
    batch = make_batch(page_format("turboquant", 128), [50, 200], [1, 1], HEADS, 4, 16, seed, basis=plain)
    batch.query *= size
    check(batch, BF16, 0.1, 1, basis=basis)


def test_poison_changes_nothing_under_a_basis(rng, seed):
    fmt, basis = page_format("turboquant", 128), random_basis(rng, 128)
    batches = [make_batch(fmt, [5, 33, 64], [3] * 3, HEADS, 4, 32, seed, poison, basis=basis) for poison in (0xFF, 0)]
    assert torch.equal(*(emulated.decode(b, b.query.to(BF16), 0.1, 3, basis=basis) for b in batches))


def test_a_query_that_is_not_finite_spoils_no_other(rng, seed):
    basis = random_basis(rng, 128)
    batch = make_batch(page_format("turboquant", 128), [40], [3], HEADS, 4, 16, seed, basis=basis)
    clean = emulated.decode(batch, batch.query.to(BF16), 0.1, 3, basis=basis)
    batch.query[1, 2, 5] = float("nan")
    out = emulated.decode(batch, batch.query.to(BF16), 0.1, 3, basis=basis)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)
