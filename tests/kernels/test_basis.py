"""The key basis: its closed form against what it should minimise, and the reference's pages under it."""

import math

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.basis import balanced_transform, key_basis
from vllm_turboquant.kernels.format import PRESETS, page_format
from vllm_turboquant.kernels.statistics import SKIPPED, KeyStatistics, bucket_shifts, bucket_tokens

from .oracle import around_means, random_basis, spread

HEADS, GROUP = 2, 3


@pytest.fixture
def rng(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("d", [16, 64])
def test_balanced_transform_minimises_the_predicted_error(rng, d):
    ck, cq = spread(rng, d), spread(rng, d)

    def error(a):
        inverse = torch.linalg.inv(a)
        return float((a @ ck @ a.mT).trace() * (inverse.mT @ cq @ inverse).trace())

    best = balanced_transform(ck, cq, shrinkage=0.0)
    assert torch.allclose(best, best.mT) and torch.linalg.eigvalsh(best).min() > 0
    # Cauchy-Schwarz: no invertible matrix goes below (tr (Ck^1/2 Cq Ck^1/2)^1/2)^2.
    bound = float(torch.linalg.eigvals(ck @ cq).real.sqrt().sum()) ** 2
    assert error(best) == pytest.approx(bound, rel=1e-6)
    for _ in range(20):
        other = best + 1e-2 * best.norm() / d * torch.randn(d, d, generator=rng, dtype=torch.float64)
        assert error(other) >= error(best) * (1 - 1e-9)
    assert error(torch.eye(d, dtype=torch.float64)) > 1.5 * error(best)


def test_equal_isotropic_moments_need_no_transform():
    eye = torch.eye(32, dtype=torch.float64)
    assert torch.allclose(balanced_transform(9 * eye, 9 * eye), eye)


def test_unseen_directions_stay_invertible(rng):
    x = torch.randn(5, 64, generator=rng, dtype=torch.float64)
    basis = key_basis(balanced_transform((x.T @ x)[None], (x.T @ x)[None]), torch.zeros(1, 64))
    product = (basis.forward.double() @ basis.inverse.double())[0]
    assert (product - torch.eye(64, dtype=torch.float64)).abs().max() < 1e-4
    dead = key_basis(balanced_transform(torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)), torch.zeros(1, 64))
    assert dead.forward.isfinite().all()


@pytest.mark.parametrize(
    "transform, mean",
    [
        (torch.full((1, 16, 16), math.nan), torch.zeros(1, 16)),
        (torch.eye(16)[None], torch.full((1, 16), math.inf)),
        (torch.zeros(1, 16, 16), torch.zeros(1, 16)),
        (-torch.eye(16)[None], torch.zeros(1, 16)),
    ],
)
def test_unusable_parts_are_refused(transform, mean):
    with pytest.raises(ValueError, match="key transform"):
        key_basis(transform, mean)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("d", "buckets"), [(64, 1), (128, 3)])
def test_pages_under_a_basis_attend_as_their_decoded_vectors_do(rng, preset, d, buckets):
    fmt, basis = page_format(preset, d), random_basis(rng, HEADS, d, buckets=buckets, bucket=16)
    length, blocks = 45, 3
    key, value = (torch.randn(length, HEADS, d, generator=rng, dtype=torch.float64) for _ in range(2))
    key = around_means(key, basis, sinks=2)
    cache = torch.full((blocks, HEADS, 16, fmt.slot_bytes), 0xFF, dtype=torch.uint8)
    reference.store(key, value, cache, torch.arange(length), fmt, basis, torch.arange(length))
    cache[-1, :, length % 16 :] = 0
    query = torch.randn(2, HEADS * GROUP, d, generator=rng, dtype=torch.float64)
    table, lengths, starts = torch.arange(blocks)[None], torch.tensor([length]), torch.tensor([0, 2])
    out = reference.attend(query, cache, table, lengths, starts, fmt, d**-0.5, basis=basis)
    loaded = reference.load_vectors(cache, torch.arange(blocks), fmt, basis, 16 * torch.arange(blocks))
    k, v = (x[:length].repeat_interleave(GROUP, 1) for x in loaded)
    scores = torch.einsum("qhd,lhd->hql", query, k) * d**-0.5
    scores[:, 0, -1] = -math.inf
    truth = torch.einsum("hql,lhd->qhd", scores.softmax(-1), v)
    # The bases's float32 matrices are each other's inverse to 1e-7 of their condition, at most 1e4.
    assert (out - truth).abs().max() < 1e-3 * truth.abs().max()


@pytest.mark.parametrize("buckets", (1, 3))
def test_means_cost_no_accuracy(buckets, rng):
    """Keys with constants far beyond their spread: the plain rotation spends its codes on the constant, the mean of another
    bucket on what it is off. The last bucket goes on for ever."""
    d, fmt = 128, page_format("turboquant", 128)
    eye = torch.eye(d).expand(HEADS, d, d)
    means = torch.randn(HEADS, buckets, d, generator=rng) * 100
    fitted = key_basis(eye, means, bucket=32)
    # Tokens of one sequence, some of them before others; a slot's unit stands where the block table says.
    starts = torch.tensor([80, 0, 160, 32])
    positions = (starts[:, None] + torch.arange(16)).flatten()
    key = torch.randn(64, HEADS, d, generator=rng) + means[:, (positions // 32).clamp(max=buckets - 1)].transpose(0, 1)
    errors = []
    for basis in (fitted, key_basis(eye, means[:, 0]), None):
        cache = torch.zeros(4, HEADS, 16, fmt.slot_bytes, dtype=torch.uint8)
        reference.store(key, key, cache, torch.arange(64), fmt, basis, positions)
        decoded = reference.load_vectors(cache, torch.arange(4), fmt, basis, starts)[0]
        errors.append(float(((decoded - key) ** 2).mean()))
    print("errors with means by bucket, with one mean, and without", errors)
    assert errors[0] < 0.0085 < 1 < errors[2]
    assert errors[1] == errors[0] if buckets == 1 else errors[1] > 1


def test_buckets_want_positions(rng):
    fmt, basis = page_format("turboquant", 64), random_basis(rng, HEADS, 64, buckets=2)
    cache = torch.zeros(1, HEADS, 16, fmt.slot_bytes, dtype=torch.uint8)
    key = torch.zeros(3, HEADS, 64)
    for positions in (None, torch.arange(2)):
        with pytest.raises(ValueError, match="needs the positions of all 3 tokens"):
            reference.store(key, key, cache, torch.arange(3), fmt, basis, positions)
    with pytest.raises(ValueError, match="needs the positions of all 16 tokens"):
        reference.load(cache, torch.arange(1), fmt, basis)


@pytest.mark.parametrize(("d", "preset"), [(64, "turboquant"), (256, "turboquant-k3v3"), (128, "turboquant-k4v4-qjl")])
def test_first_tokens_are_stored_around_their_own_mean(rng, d, preset):
    """Alike in all texts and far from other keys: codes around the second mean are as fine as the keys' spread there."""
    fmt = page_format(preset, d)
    mean, sink = (torch.randn(HEADS, d, generator=rng) * 20 for _ in range(2))
    key = torch.randn(32, HEADS, d, generator=rng) + mean
    key[::16] = 0.1 * torch.randn(2, HEADS, d, generator=rng) + sink
    errors = []
    for basis in (key_basis(torch.eye(d).expand(HEADS, d, d), mean, sink), key_basis(torch.eye(d).expand(HEADS, d, d), mean)):
        cache = torch.zeros(2, HEADS, 16, fmt.slot_bytes, dtype=torch.uint8)
        reference.store(key, key, cache, torch.arange(32), fmt, basis)
        error = (reference.load_vectors(cache, torch.arange(2), fmt, basis)[0] - key) ** 2
        errors.append((float(error[::16].mean()), float(error[1:16].mean())))
    print("errors of (first tokens, others) with two means and with one", errors)
    # The distance of two such means is 28 a dim: 80,000 times the variance around the second one.
    assert errors[0][0] < 1e-3 * errors[1][0]
    assert errors[0][1] == errors[1][1]


def rotary(d, position):
    """Neox-style rotary embedding of one position as a matrix ``[d, d]``."""
    angle = position * 100.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


def test_turned_statistics_are_those_of_turned_vectors(rng):
    d, tokens, shifts = 16, 50, (0, 7, 300)
    query, key = (torch.randn(tokens, n, d, generator=rng, dtype=torch.float64) + 1 for n in (HEADS * GROUP, HEADS))
    statistics, truth = KeyStatistics(HEADS, d, torch.device("cpu")), KeyStatistics(HEADS, d, torch.device("cpu"))
    for part in (slice(0, 20), slice(20, tokens)):
        statistics.add(query[part], key[part])
    turns = [rotary(d, p) for p in shifts]
    buckets = [[7, 11], [32, 40], [64, 65]]
    for turn in turns:
        for part in (slice(0, 20), slice(20, tokens)):
            truth.add(query[part] @ turn.T, key[part] @ turn.T)
    spread = statistics.spread(turns, torch.stack([sum(rotary(d, p) for p in inside) / 2 for inside in buckets]), 32)
    assert spread.tokens == truth.tokens == (tokens - 2 * SKIPPED) * len(shifts)
    assert spread.sinks == 2 and torch.allclose(spread.sink_sum, key[0] + key[20])
    for name in ("key_sum", "key_moment", "query_moment"):
        # Of fp32 products of 50 tokens.
        assert torch.allclose(getattr(spread, name), getattr(truth, name), rtol=1e-4, atol=1e-3), name
    seen = torch.cat([key[SKIPPED:20], key[20 + SKIPPED :]])
    basis = spread.basis()
    for b, inside in enumerate(buckets):
        mean = torch.cat([seen @ rotary(d, p).T for p in inside]).mean(0)
        assert torch.allclose(basis.means[:, b].double(), mean, atol=1e-4)
    own = torch.cat([(seen - seen.mean(0)) @ turn.T for turn in turns])
    covariance = torch.einsum("thi,thj->hij", own, own) / len(own)
    expected = key_basis(balanced_transform(covariance, truth.query_moment / truth.tokens), mean)
    assert torch.allclose(basis.forward, expected.forward, rtol=1e-3, atol=1e-3) and basis.bucket == 32
    # Where a constant shows in the logits there is no mean, and the moment is about 0.
    assert spread.basis(centred=False).means.shape == (HEADS, 1, d)
    assert torch.equal(spread.to("cpu").basis().means, basis.means)


@pytest.mark.parametrize("served", [100, 512, 8192, 100_000])
def test_shifts_of_a_bucket_stay_in_it(served):
    size, shifts = bucket_tokens(served), bucket_shifts(served, 300)
    assert size % 512 == 0 and (len(shifts) - 1) * size < served <= len(shifts) * size and len(shifts) <= 64
    assert size == 512 or len(shifts) > 32
    assert all(b * size <= p <= (b + 1) * size - 300 for b, inside in enumerate(shifts) for p in inside)
    assert bucket_shifts(512, 2048) == [[0] * 4]


def test_query_heads_belong_to_their_key_head(rng):
    d = 16
    query = torch.randn(40, HEADS * GROUP, d, generator=rng)
    query[:, GROUP:] *= 10
    statistics = KeyStatistics(HEADS, d, torch.device("cpu"))
    statistics.add(query, torch.randn(40, HEADS, d, generator=rng))
    sizes = statistics.query_moment.diagonal(dim1=-2, dim2=-1).sum(-1) / statistics.tokens
    assert sizes[0] == pytest.approx(GROUP * d, rel=0.3) and sizes[1] == pytest.approx(100 * GROUP * d, rel=0.3)


def test_fitted_basis_carries_anisotropic_keys_better(rng):
    """Logits of k3 codes: with mean, with transform, with both, and with neither."""
    d, tokens = 64, 512
    fmt = page_format("turboquant-k3v3", d)
    root_k, root_q = spread(rng, HEADS, d), spread(rng, HEADS, d)
    key = torch.einsum("hij,thj->thi", root_k, torch.randn(tokens, HEADS, d, generator=rng, dtype=torch.float64))
    key = key / key.std() + 5 * torch.randn(HEADS, d, generator=rng)
    query = torch.einsum("hij,thj->thi", root_q, torch.randn(tokens, HEADS, d, generator=rng, dtype=torch.float64))
    statistics = KeyStatistics(HEADS, d, torch.device("cpu"))
    statistics.add(query, key)
    errors = {}
    for centred in (True, False):
        for balanced in (True, False):
            basis = statistics.basis(centred=centred, balanced=balanced)
            cache = torch.zeros(tokens // 16, HEADS, 16, fmt.slot_bytes, dtype=torch.uint8)
            reference.store(key, key, cache, torch.arange(tokens), fmt, basis)
            decoded = reference.load_vectors(cache, torch.arange(tokens // 16), fmt, basis)[0]
            noise = torch.einsum("qhd,lhd->hql", query, decoded - key)
            errors[centred, balanced] = float((noise - noise.mean(-1, keepdim=True)).square().mean())
    print("logit errors by (centred, balanced)", errors)
    assert errors[True, True] < 0.8 * errors[True, False] < 0.8 * errors[False, False]
    assert errors[True, True] < 0.8 * errors[False, True]
    assert not statistics.basis(centred=False).means.any()


def test_broken_sums_are_refused():
    statistics = KeyStatistics(1, 16, torch.device("cpu"))
    statistics.add(torch.ones(9, 1, 16), torch.full((9, 1, 16), math.inf))
    with pytest.raises(ValueError, match="not finite"):
        statistics.basis()
