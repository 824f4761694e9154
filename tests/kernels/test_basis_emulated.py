"""The CUDA kernels under key bases, run on the CPU over an emulated warp, against the float64 reference."""

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.basis import KeyBasis, _power, key_basis
from vllm_turboquant.kernels.cuda import fragments
from vllm_turboquant.kernels.cuda.variant import HEAD_SIZES, Tuning
from vllm_turboquant.kernels.format import page_format

from ..gpu.shadow import attend
from . import emulated
from .oracle import around_means, make_batch, random_basis, spread
from .test_basis import HEADS
from .test_context_emulated import PAD, workspaces
from .test_context_emulated import check as check_context
from .test_cuda_emulated import BF16, COVERED, FP16, LENGTHS, check, check_winners

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture
def rng(seed):
    return torch.Generator().manual_seed(seed)


# The matrix is rounded to 11 bits beside the query, and bases whose axes differ tenfold leave sums that cancel.
SLACK = 2


def centred(basis, sink_mean=None):
    zero = torch.zeros_like(basis.means)
    return KeyBasis(basis.forward, basis.inverse, zero, zero[:, 0].contiguous() if sink_mean is None else sink_mean, basis.bucket)


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_decode_in_every_format(preset, head_size, dtype, rng, seed):
    """Of one bucket, and of more than an MMA tile has rows."""
    basis = random_basis(rng, HEADS, head_size, buckets=1 if dtype == FP16 else 18, bucket=16)
    batch = make_batch(page_format(preset, head_size), LENGTHS, [1] * 7, HEADS, 4, 32, seed, basis=basis)
    check(batch, dtype, head_size**-0.5, 1, slack=SLACK, basis=basis)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize(("group", "query_lens"), ((1, 1), (6, 1), (16, 1), (4, 3)))
def test_decode_of_every_shape(group, query_lens, head_size, rng, seed):
    """More rows than one MMA tile, and than one CTA, holds."""
    basis = random_basis(rng, HEADS, head_size, buckets=3, bucket=48)
    queries = [1 + i % query_lens for i in range(7)]
    fmt, lengths = page_format("turboquant", head_size), [max(n, 8) for n in LENGTHS]
    batch = make_batch(fmt, lengths, queries, HEADS, group, 16, seed, basis=basis)
    check(batch, BF16, head_size**-0.5, query_lens, slack=SLACK, basis=basis)


@pytest.mark.parametrize("options", ({"window": 20}, {"window": 100}, {"soft_cap": 2.0}, {"sinks": BF16}))
@pytest.mark.parametrize("query_len", (1, 3))
def test_decode_with_window_soft_cap_and_sinks(options, query_len, rng, seed):
    """Soft cap and sinks see a constant that is added to all logits: only bases without a mean go with them, but for that of
    first tokens, which is no such constant."""
    basis = random_basis(rng, HEADS, 128, buckets=8)
    if "window" not in options:
        basis = centred(random_basis(rng, HEADS, 128), basis.sink_mean)
    if "sinks" in options:
        options = {"sinks": torch.randn(4 * HEADS, generator=rng).to(options["sinks"])}
    batch = make_batch(page_format("turboquant", 128), [20, 33, 300], [query_len] * 3, HEADS, 4, 16, seed, basis=basis)
    check(batch, BF16, 0.1, query_len, slack=SLACK, basis=basis, **options)


@pytest.mark.parametrize("tuning", (Tuning(8, 2, 2, True), Tuning(4, 2, 3, False), Tuning(2, 1, 1, False)))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_decode_with_any_tuning(tuning, head_size, rng, seed):
    """Warps that have no tile of the matrix, and several; segments of some buckets."""
    basis = random_basis(rng, HEADS, head_size, buckets=40, bucket=16)
    batch = make_batch(page_format("turboquant", head_size), [100, 700, 1, 0, 40], [1] * 5, HEADS, 4, 16, seed, basis=basis)
    check(batch, BF16, 0.1, 1, slack=SLACK, grid=3, tuning=tuning, basis=basis)


def fitted(rng, batch, basis):
    """The batch's keys and queries become such that their images are isotropic: themselves they are far from that."""
    size, images = batch.cache.shape[2], batch.query.unflatten(1, (HEADS, -1))
    for r, values in enumerate(batch.values):
        at = torch.arange(len(values))
        slots = batch.block_table[r, at // size].long() * size + at % size
        keys = torch.einsum("hij,thj->thi", basis.inverse.double(), torch.randn(values.shape, generator=rng).double())
        reference.store(around_means(keys, basis, sinks=0), values, batch.cache, slots, batch.fmt, basis, at)
    batch.query = torch.einsum("hij,thgi->thgj", basis.forward.double(), images).flatten(1, 2)


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kind", ("any", "fitted", "steep"))
def test_decode_errs_at_most_twice_as_plain_torch(kind, head_size, dtype, rng, seed):
    """Around no mean, for with one plain torch loses far more. "steep": a transform whose axes differ by 100 in length; only
    what it fits is held to the rule, for of other queries it leaves sums that cancel."""
    basis = random_basis(rng, HEADS, head_size)
    if kind == "steep":
        basis = key_basis(_power(spread(rng, HEADS, head_size), 0.5), torch.zeros(HEADS, head_size))
    basis = centred(basis)
    batch = make_batch(page_format("turboquant", head_size), [300] * 4, [1] * 4, HEADS, 4, 32, seed, basis=basis)
    if kind != "any":
        fitted(rng, batch, basis)
    query, scale = batch.query.to(dtype), head_size**-0.5
    tables = batch.block_table, batch.seq_lens, batch.query_start_loc
    truth = reference.attend(query.double(), batch.cache, *tables, batch.fmt, scale, basis=basis)
    plain = torch.zeros_like(query)
    for r in range(4):
        keys, values = reference.load_vectors(batch.cache, batch.block_table[r, :10].long(), batch.fmt, basis)
        plain[r : r + 1] = attend(query[r : r + 1], keys[:300].to(dtype), values[:300].to(dtype), scale)
    ours = emulated.decode(batch, query, scale, 1, basis=basis)
    errors = [float((x.double() - truth).norm() / truth.norm()) for x in (ours, plain)]
    print(f"{kind} d={head_size} {dtype}: {errors[0]:.1e} against {errors[1]:.1e}")
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("size", (0.0, 1e-30, 1e-6, 1e5, 1e30))
@pytest.mark.parametrize("basis_size", (2.0**-20, 1.0, 2.0**20))
def test_queries_and_bases_of_any_size(basis_size, size, rng, seed):
    """Keys as large as the basis says they are, so that codes stay what they were."""
    plain = random_basis(rng, HEADS, 128)
    sink_mean = (plain.sink_mean - plain.means[:, 0]) * basis_size
    basis = KeyBasis(plain.forward / basis_size, plain.inverse * basis_size, torch.zeros_like(plain.means), sink_mean)
    batch = make_batch(page_format("turboquant", 128), [50, 200], [1, 1], HEADS, 4, 16, seed, basis=plain)
    batch.query *= size
    if size * basis_size > 1e3:
        check_winners(batch, basis)
    else:
        check(batch, BF16, 0.1, 1, slack=SLACK, basis=basis)


def test_poison_changes_nothing_under_a_basis(rng, seed):
    fmt, basis = page_format("turboquant", 128), random_basis(rng, HEADS, 128)
    batches = [make_batch(fmt, [5, 33, 64], [3] * 3, HEADS, 4, 32, seed, poison, basis=basis) for poison in (0xFF, 0)]
    assert torch.equal(*(emulated.decode(b, b.query.to(BF16), 0.1, 3, basis=basis) for b in batches))


def test_a_query_that_is_not_finite_spoils_no_other(rng, seed):
    basis = random_basis(rng, HEADS, 128)
    batch = make_batch(page_format("turboquant", 128), [40], [3], HEADS, 4, 16, seed, basis=basis)
    clean = emulated.decode(batch, batch.query.to(BF16), 0.1, 3, basis=basis)
    batch.query[1, 2, 5] = float("nan")
    out = emulated.decode(batch, batch.query.to(BF16), 0.1, 3, basis=basis)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_context_in_every_format(preset, head_size, dtype, rng, seed):
    """Ranges that begin and end anywhere in units and pages; an empty one; a longest that is only a bound."""
    basis = random_basis(rng, HEADS, head_size, buckets=1 if preset == COVERED[0] else 3)
    batch = make_batch(page_format(preset, head_size), [90] * 6, [1] * 6, HEADS, 1, 32, seed, basis=basis)
    check_context(batch, [0, 17, 9, 31, 15, 48], [90, 1, 0, 50, 2, 33], dtype, longest=100, basis=basis)


@pytest.mark.parametrize("dtype", (BF16, FP16))
def test_context_errs_little_more_than_its_output_type(dtype, rng, seed):
    """Around no mean, where rounding of the matrix shows most."""
    d = 128
    basis = centred(random_basis(rng, HEADS, d))
    batch = make_batch(page_format("turboquant", d), [160], [1], HEADS, 1, 16, seed, basis=basis)
    truth = reference.load_vectors(batch.cache, batch.block_table[0, :10].long(), batch.fmt, basis)[0]
    key, value = workspaces(160, HEADS, d, dtype)
    first, starts = torch.zeros(1, dtype=torch.int32), torch.tensor([PAD, PAD + 160], dtype=torch.int32)
    emulated.load_context(batch.cache, batch.block_table, first, starts, 160, key, value, batch.fmt, basis)
    ours, rounding = (float((x.double() - truth).norm()) for x in (key[PAD:-PAD], truth.to(dtype)))
    print(f"{dtype}: {ours / rounding:.3f} of the output type's own rounding")
    # 11 bits of the matrix beside the 8 of bf16: 1 / 64 of its energy, times a few for sums that cancel.
    assert ours < 1.1 * rounding


@pytest.mark.parametrize("basis_size", (2.0**-20, 2.0**20))
def test_context_under_bases_of_any_size(basis_size, rng, seed):
    plain = centred(random_basis(rng, HEADS, 128))
    basis = KeyBasis(plain.forward / basis_size, plain.inverse * basis_size, plain.means, plain.sink_mean)
    batch = make_batch(page_format("turboquant", 128), [40], [1], HEADS, 1, 16, seed, basis=plain)
    check_context(batch, [3], [37], BF16, basis=basis)


@pytest.mark.parametrize("head_size", (128, 256))
def test_a_broken_scale_reaches_one_key(head_size, rng, seed):
    fmt, basis = page_format("turboquant", head_size), random_basis(rng, HEADS, head_size)
    batch = make_batch(fmt, [48], [1], HEADS, 1, 16, seed, basis=basis)
    tokens = torch.as_strided(
        batch.cache, (batch.cache.shape[0], fmt.unit_bytes), (batch.cache.stride(0), 1), batch.cache.storage_offset()
    )
    for token, group in ((8, 0), (21, fmt.groups - 1)):
        at = fmt.scalar_offset(token % 16, group, 0)
        tokens[int(batch.block_table[0, token // 16]), at : at + 2] = 0xFF
    key, value = workspaces(40, HEADS, head_size, BF16)
    first, starts = torch.tensor([5], dtype=torch.int32), torch.tensor([PAD, PAD + 40], dtype=torch.int32)
    emulated.load_context(batch.cache, batch.block_table, first, starts, 40, key, value, fmt, basis)
    assert key[[PAD + 8 - 5, PAD + 21 - 5], 0].isnan().all() and torch.isfinite(value).all()
    assert key.isnan().sum() == 2 * head_size


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_fragments_are_the_basis_and_made_once(head_size, rng):
    """Both parts hold the inverse to 22 bits of each row's size; a basis keeps its tensors, whose address graphs hold."""
    basis = random_basis(rng, HEADS, head_size, buckets=3)
    records = fragments.key_fragments(basis, 2)
    assert fragments.key_fragments(basis, 2) is records and fragments.key_fragments(basis, 1) is not records
    assert fragments.query_fragments(basis) is fragments.query_fragments(basis)
    assert records.data_ptr() % 16 == 0 and records.shape[1] % 16 == 0
    size = 2 * head_size**2
    parts = [records[:, at : at + size].contiguous().view(torch.float16).double() for at in (0, size)]
    power = records[:, 2 * size : 2 * size + 4].contiguous().view(torch.float32).double()
    # Order aside: sorted, for every entry stands once.
    ours, truth = (((parts[0] + parts[1]) * power).sort().values, basis.inverse.flatten(1).double().sort().values)
    assert (ours - truth).abs().max() < 2**-22 * truth.abs().max()
    means = records[:, 2 * size + 16 :].contiguous().view(torch.float32).view(HEADS, -1, head_size)
    assert torch.equal(means[:, 1:], basis.means) and torch.equal(means[:, 0], basis.sink_mean - basis.means[:, 0])
    queries = fragments.query_fragments(basis)
    powers = queries[:, size : size + 8].contiguous().view(torch.float32)
    assert torch.equal(powers.log2() % 1, 0 * powers)
    rows = queries[:, size + 16 :].contiguous().view(torch.float16).double().view(HEADS, 2, -1).sum(1).unflatten(1, (16, -1))
    ours, truth = (rows * powers.prod(-1)[:, None, None].double()).flatten(1), torch.zeros(HEADS, 16, head_size)
    truth[:, 0], truth[:, 1:3] = means[:, 0], basis.means[:, 1:] - basis.means[:, :1]
    # Two fp16 parts of each entry; sorted again.
    assert (ours.sort().values - truth.double().flatten(1).sort().values).abs().max() < 2**-20 * truth.abs().max()
