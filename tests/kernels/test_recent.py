"""The newest tokens beside the pages: which units have frames, against a slow model; their copy, and attention to them."""

import math
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_turboquant.kernels.recent_claim import RecentUnits, frame_bytes, frames_needed, units_needed

from .interpreted import attend_recent, interpret, keep  # noqa: F401
from .recent_model import Serving, Truth, as_tensors
from .recent_oracle import make_recent, merged


def run_schedule(seed, window, max_query_len, block_size, frames, steps=150, everyone=False):
    """Serves random requests, checking every step; how many tokens of decodes were exact, of how many in their windows."""
    rng = random.Random(seed)
    serving = Serving(rng, blocks=640 // block_size, block_size=block_size, max_query_len=max_query_len, everyone=everyone)
    units = 640 // 16
    recent = RecentUnits(units, frames, 16, window, max_query_len, block_size, torch.device("cpu"))
    truth = Truth(units, frames, window, max_query_len, block_size)
    exact = wanted = 0
    for _ in range(steps):
        batch = serving.step()
        rows = as_tensors(batch, rng)
        recent.ends.fill_(-7)
        recent.claim(*rows)
        ends = truth.claim(batch)
        assert recent.ends.tolist() == ends + [0] * (len(rows[1]) - len(ends)) + [-7] * (16 - len(rows[1]))
        assert {u: f for u, f in enumerate(recent.frame_of.tolist()) if f >= 0} == truth.frame_of
        live = truth.frame_of.values()
        assert {f: recent.first[f].item() for f in live} == {f: truth.first[f] for f in live}
        assert all(recent.owner[f].item() == u for u, f in truth.frame_of.items())
        truth.keep(batch)
        for row, end in zip(batch, ends, strict=True):
            if row.request is None or row.new > max_query_len:
                continue
            assert all(truth.exact(row, position) for position in range(end, row.length))
            exact += row.length - end
            wanted += min(row.length, window)
            if frames >= units or everyone:
                assert end <= max(row.length - window, row.request.written_from)
        truth.check(serving)
    return exact, wanted


@pytest.mark.parametrize(("window", "max_query_len", "block_size"), ((64, 1, 16), (20, 3, 32), (33, 4, 64), (1, 2, 16)))
def test_frames_hold_what_the_slots_do(window, max_query_len, block_size, seed):
    for frames in (1, 7, 20, 40):
        exact, wanted = run_schedule(seed + frames, window, max_query_len, block_size, frames)
        assert wanted and exact
    # As many frames as a batch may need at once, and every request in every batch.
    exact, wanted = run_schedule(
        seed, window, max_query_len, block_size, frames_needed(Serving.RUNNING, window, max_query_len), everyone=True
    )
    assert exact > wanted / 2


def test_claim_never_waits_for_the_device():
    """Fake tensors have no contents: whatever depends on them raises."""
    with FakeTensorMode():
        device = torch.device("cpu")
        recent = RecentUnits(64, 12, 8, 64, 3, 32, device)
        ints = [torch.zeros(n, dtype=torch.int32, device=device) for n in (5, 6)]
        recent.claim(torch.zeros(5, 9, dtype=torch.int32), *ints, torch.zeros(40, dtype=torch.int64))


def test_empty_batches_change_nothing():
    recent = RecentUnits(8, 4, 8, 64, 1, 16, torch.device("cpu"))
    none = torch.zeros(0, dtype=torch.int32)
    recent.claim(none.view(0, 4), none, torch.zeros(1, dtype=torch.int32), none.long())
    recent.claim(torch.zeros(1, 4, dtype=torch.int32), torch.tensor([3], dtype=torch.int32), none.new_zeros(2), none.long())
    assert bool((recent.frame_of == -1).all())


def test_requests_without_new_tokens_claim_nothing():
    """Even where the token before theirs in the batch fills their last unit."""
    recent = RecentUnits(8, 4, 8, 64, 1, 16, torch.device("cpu"))
    table = torch.tensor([[3], [3], [3]], dtype=torch.int32)
    lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([5, 7, 9], [0, 1, 1, 2]))
    recent.claim(table, lengths, starts, torch.tensor([3 * 16 + 4, -1]))
    assert recent.frame_of.tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, -1]
    assert int(recent.first[0]) == 4 and recent.ends.tolist() == [4, 7, 9, 0, 0, 0, 0, 0]


def test_a_shared_unit_that_is_rewritten_loses_its_old_frame():
    """Requests of one batch share a page: one stores it long before its window, the other has it in its window."""
    recent = RecentUnits(8, 8, 8, 16, 1, 16, torch.device("cpu"))

    def claim(table, lengths, starts, slots):
        recent.claim(*(torch.tensor(x, dtype=torch.int32) for x in (table, lengths, starts)), torch.tensor(slots))

    claim([[5]], [16], [0, 16], list(range(80, 96)))
    assert int(recent.frame_of[5]) == 0
    claim([[5, 6, 7], [5, 4, -1]], [48, 17], [0, 48, 49], [*range(80, 128), 64])
    assert int(recent.frame_of[5]) == -1 and recent.ends.tolist()[:2] == [48, 16]


@pytest.mark.parametrize("tokens", (1, 16, 17, 64, 66, 79, 80, 81))
def test_units_needed(tokens):
    touched = max(len({position // 16 for position in range(first, first + tokens)}) for first in range(16))
    assert units_needed(tokens, 1) == units_needed(tokens - 1, 2) == touched
    assert frames_needed(3, tokens, 1) == 3 * touched
    assert frame_bytes(8, 128, torch.bfloat16) == 2 * 16 * 8 * 128 * 2


@pytest.mark.parametrize("head_size", (16, 80, 128, 576))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("with_mean", (False, True))
def test_keep(head_size, dtype, with_mean, seed):
    g = torch.Generator().manual_seed(seed)
    tokens, heads, frames, units = 21, 3, 5, 8
    # Views of one buffer, as vLLM's qkv projection gives them.
    both = torch.randn(tokens + 4, 2, heads + 1, head_size, generator=g).to(dtype)
    key, value = both[:, 0, :heads], both[:, 1, :heads]
    mean = torch.randn(heads, head_size, generator=g) if with_mean else None
    frame_of = torch.full((units + 1,), -1, dtype=torch.int32)
    frame_of[torch.randperm(units, generator=g)[:frames]] = torch.randperm(frames, generator=g).to(torch.int32)
    slots = torch.randperm(units * 16, generator=g)[:tokens]
    slots[[2, 20]] = -1
    pools = [torch.full((frames, 16, heads, head_size), float("nan"), dtype=dtype) for _ in range(2)]
    keep(key, value, slots, *pools, frame_of, mean)
    expected = [torch.full_like(pool, float("nan")) for pool in pools]
    for token, slot in enumerate(slots.tolist()):
        frame = int(frame_of[slot // 16])
        if slot >= 0 and frame >= 0:
            expected[0][frame, slot % 16] = key[token] if mean is None else (key[token].float() - mean).to(dtype)
            expected[1][frame, slot % 16] = value[token]
    assert not expected[0].isnan().all()
    # Triton's interpreter cuts fp32 down to bf16 instead of rounding.
    rtol = torch.finfo(dtype).eps if with_mean and dtype == torch.bfloat16 else 0
    for ours, theirs, tolerance in zip(pools, expected, (rtol, 0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0, equal_nan=True)


def check(batch, rtol=1e-4, atol=1e-5, **options):
    out, truth = batch.out.clone(), merged(batch, **options)
    lse = batch.lse.clone()
    attend_recent(batch.query, out, lse, *batch.tensors, 0.3, batch.block_size, batch.max_query_len, **options)
    torch.testing.assert_close(out.double(), truth, rtol=rtol, atol=atol, equal_nan=True)
    torch.testing.assert_close(lse, batch.lse, rtol=0, atol=0, equal_nan=True)


# Of each request: length, query tokens, where exact tokens begin. Nothing before; more than one tile; one token; none; a padded
# row; rows whose own position comes before the exact ones.
REQUESTS = {
    1: [(9, 1, 0), (90, 1, 23), (40, 1, 39), (17, 1, 17), (0, 0, 0), (33, 1, 16), (0, 1, 0)],
    3: [(3, 3, 0), (90, 3, 22), (40, 2, 39), (41, 3, 40), (20, 3, 20), (0, 0, 0), (64, 1, 30)],
}


@pytest.mark.parametrize("query_len", (1, 3))
@pytest.mark.parametrize("group", (1, 3, 7))
@pytest.mark.parametrize("head_size", (64, 80, 128))
def test_attend(query_len, group, head_size, seed):
    check(make_recent(REQUESTS[query_len], query_len, 2, group, head_size, 32, torch.float32, seed))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_attend_in_16_bits(dtype, seed):
    """The output rounds; nothing else does in the interpreter."""
    step = torch.finfo(dtype).eps
    check(make_recent(REQUESTS[3], 3, 1, 4, 64, 16, dtype, seed), rtol=step, atol=step)


@pytest.mark.parametrize("query_len", (1, 3))
@pytest.mark.parametrize("options", ({"window": 1}, {"window": 5}, {"window": 45}, {"soft_cap": 2.0}, {"sinks": True}))
def test_attend_with_window_soft_cap_and_sinks(query_len, options, seed):
    batch = make_recent(REQUESTS[query_len], query_len, 2, 2, 64, 16, torch.float32, seed, **options)
    check(batch, **{**options, **({"sinks": batch.sinks} if "sinks" in options else {})})


def test_attend_of_more_rows_than_a_program_holds(seed):
    requests = [(70, 8, 1), (8, 8, 0), (30, 5, 27)]
    check(make_recent(requests, 8, 1, 16, 32, 32, torch.float32, seed))
    check(make_recent(requests, 8, 1, 16, 272, 32, torch.float32, seed))


def test_attend_leaves_requests_of_many_tokens_alone(seed):
    """A prefill between decodes: its `ends` is its length, and its rows are others' work."""
    batch = make_recent([(40, 1, 20), (30, 9, 30), (12, 2, 0)], 2, 2, 2, 64, 16, torch.float32, seed)
    check(batch)


@pytest.mark.parametrize("low", (-1e30, -math.inf))
def test_a_low_lse_means_no_tokens_before(low, seed):
    batch = make_recent([(40, 2, 20), (33, 1, 3)], 2, 1, 2, 64, 16, torch.float32, seed)
    batch.lse.fill_(low)
    batch.out.fill_(float("nan"))
    batch.before = [(k[:0], v[:0]) for k, v in batch.before]
    check(batch)
