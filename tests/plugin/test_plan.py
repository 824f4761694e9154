"""Which context tokens a step's prefills read, and which query rows read them: against every pair, one by one."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from vllm_turboquant.plan import PrefillPlan, plan_prefill, split_contexts


def random_batch(seed: int) -> tuple[list[int], list[int]]:
    stream = random.Random(seed)
    count = stream.randint(1, 6)
    return [stream.randint(1, 40) for _ in range(count)], [
        stream.choice((0, 1, 16, stream.randint(0, 200))) for _ in range(count)
    ]


def make_plan(query_lens: list[int], contexts: list[int], bounds: list[int] | None = None, inexact: int = 0) -> PrefillPlan:
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    older = torch.tensor(contexts, dtype=torch.int32)
    return PrefillPlan(0, 0, query_lens, bounds or contexts, starts, older, inexact)


def loosened(seed: int, contexts: list[int], inexact: int) -> list[int]:
    stream = random.Random(seed)
    return [context + stream.randrange(max(1, inexact)) for context in contexts]


@pytest.mark.parametrize("inexact", (0, 4))
@pytest.mark.parametrize("capacity", (16, 50, 1000))
def test_parts_hold_every_context_token_once_and_fit(capacity: int, inexact: int, seed: int) -> None:
    for case in range(50):
        query_lens, contexts = random_batch(seed + case)
        plan = make_plan(query_lens, contexts, loosened(seed + case, contexts, inexact), inexact)
        seen = {(r, token): 0 for r, context in enumerate(contexts) for token in range(context)}
        for part in plan.parts(capacity):
            assert 0 < part.room <= capacity
            begin, end = part.requests.start, part.requests.stop
            assert part.rows == slice(sum(query_lens[:begin]), sum(query_lens[:end]))
            assert part.query_start_loc[0] == 0 and part.query_start_loc.diff().tolist() == query_lens[begin:end]
            keys = part.key_start_loc.diff().tolist()
            assert part.longest_query == max(query_lens[begin:end]) and part.longest_key >= max(keys)
            # What stays unwritten at the end is what FlashAttention's last tile may read, so it must be known.
            assert part.room - part.loose <= part.key_start_loc[-1] <= part.room
            for request, first, count in zip(range(begin, end), part.first.tolist(), keys, strict=True):
                for token in range(first, first + count):
                    seen[request, token] += 1
        assert set(seen.values()) <= {1}


def test_parts_are_as_few_as_fit() -> None:
    assert split_contexts([0, 100, 0, 20, 5], 120) == [[(1, 0, 100), (3, 0, 20)], [(4, 0, 5)]]
    assert split_contexts([250], 100) == [[(0, 0, 100)], [(0, 100, 100)], [(0, 200, 50)]]
    assert split_contexts([0, 0], 16) == []


@pytest.mark.parametrize("inexact", (0, 4))
@pytest.mark.parametrize("window", (1, 7, 64))
@pytest.mark.parametrize("capacity", (80, 1000))
def test_windows_hold_what_each_row_sees_and_nothing_freed(window: int, capacity: int, inexact: int, seed: int) -> None:
    """A row at position p needs tokens ``p - window + 1 .. p``; nothing older than the part's first row's window is read."""
    for case in range(50):
        query_lens, contexts = random_batch(seed + case)
        plan = make_plan(query_lens, contexts, loosened(seed + case, contexts, inexact), inexact)
        rows_seen = 0
        for part in plan.windows(window, capacity):
            start, context = sum(query_lens[: part.request]), contexts[part.request]
            assert part.rows.start == rows_seen
            rows_seen = part.rows.stop
            (skip, tail), (begin, end) = part.tail_start_loc.tolist(), part.key_start_loc.tolist()
            assert (skip, part.tail, part.longest_key) == (begin, tail, end) and end <= capacity
            assert part.query_start_loc.tolist() == [0, part.rows.stop - part.rows.start]
            first_position = context + part.rows.start - start
            held = list(range(part.first.item(), part.first.item() + tail - skip))
            assert all(token < context for token in held)
            held += [context + row - start for row in range(part.own.start, part.own.stop)]
            # Consecutive positions up to the last row's, from the first row's oldest on: causal attention then aligns.
            assert held == list(range(max(0, first_position - window + 1), context + part.rows.stop - start))
        assert rows_seen == sum(query_lens)


@pytest.mark.parametrize("inexact", (0, 5))
def test_planned_from_a_batch_with_decodes_first(inexact: int) -> None:
    """A draft model's host lengths: one short, or too long by drafts that were rejected meanwhile."""
    lengths = torch.tensor([10, 7, 40, 33], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 32, 65], dtype=torch.int32)
    host = lengths + torch.tensor([0, 0, -1, 2]) if inexact else lengths
    common = SimpleNamespace(
        num_reqs=4, query_start_loc_cpu=starts, query_start_loc=starts, seq_lens=lengths, seq_lens_cpu_upper_bound=host
    )
    plan = plan_prefill(common, 2, inexact)  # type: ignore[arg-type]
    assert (plan.first, plan.start, plan.tokens, plan.longest) == (2, 2, 63, 33)
    assert (plan.query_lens, plan.contexts.tolist(), plan.query_start_loc.tolist()) == ([30, 33], [10, 0], [0, 30, 63])
    assert plan.bounds == ([10, 3] if inexact else [10, 0])
