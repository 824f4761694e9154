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


def make_plan(query_lens: list[int], contexts: list[int]) -> PrefillPlan:
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PrefillPlan(0, 0, query_lens, contexts, starts)


@pytest.mark.parametrize("capacity", (16, 50, 1000))
def test_parts_hold_every_context_token_once_and_fit(capacity: int, seed: int) -> None:
    for case in range(50):
        query_lens, contexts = random_batch(seed + case)
        plan = make_plan(query_lens, contexts)
        seen = {(r, token): 0 for r, context in enumerate(contexts) for token in range(context)}
        for part in plan.parts(capacity):
            assert 0 < sum(count for _, _, count in part.ranges) <= capacity
            begin, end = part.ranges[0][0], part.ranges[-1][0] + 1
            assert part.rows == slice(sum(query_lens[:begin]), sum(query_lens[:end]))
            assert part.query_start_loc.diff().tolist() == query_lens[begin:end]
            keys = part.key_start_loc.diff().tolist()
            assert sum(keys) == sum(count for _, _, count in part.ranges)
            assert part.longest_query == max(query_lens[begin:end]) and part.longest_key == max(keys)
            for request, first, count in part.ranges:
                assert keys[request - begin] == count  # at most one range a request
                for token in range(first, first + count):
                    seen[request, token] += 1
        assert set(seen.values()) <= {1}


def test_parts_are_as_few_as_fit() -> None:
    assert split_contexts([0, 100, 0, 20, 5], 120) == [[(1, 0, 100), (3, 0, 20)], [(4, 0, 5)]]
    assert split_contexts([250], 100) == [[(0, 0, 100)], [(0, 100, 100)], [(0, 200, 50)]]
    assert split_contexts([0, 0], 16) == []


@pytest.mark.parametrize("window", (1, 7, 64))
@pytest.mark.parametrize("capacity", (80, 1000))
def test_windows_hold_what_each_row_sees_and_nothing_freed(window: int, capacity: int, seed: int) -> None:
    """A row at position p needs tokens ``p - window + 1 .. p``; nothing older than the part's first row's window is read."""
    for case in range(50):
        query_lens, contexts = random_batch(seed + case)
        plan = make_plan(query_lens, contexts)
        rows_seen = 0
        for part in plan.windows(window, capacity):
            start, context = sum(query_lens[: part.request]), contexts[part.request]
            assert part.rows.start == rows_seen
            rows_seen = part.rows.stop
            assert part.longest_key <= capacity and part.key_start_loc.tolist() == [0, part.longest_key]
            assert part.query_start_loc.tolist() == [0, part.rows.stop - part.rows.start]
            first_position = context + part.rows.start - start
            held = list(range(part.oldest, part.oldest + part.tail))
            held += [context + row - start for row in range(part.own.start, part.own.stop)]
            # Consecutive positions up to the last row's, from the first row's oldest on: causal attention then aligns.
            assert held == list(range(max(0, first_position - window + 1), context + part.rows.stop - start))
            assert all(token < context for token in held[: part.tail])
        assert rows_seen == sum(query_lens)


def test_planned_from_a_batch_with_decodes_first() -> None:
    lengths = [10, 7, 40, 33]
    starts = torch.tensor([0, 1, 2, 32, 65], dtype=torch.int32)
    common = SimpleNamespace(
        num_reqs=4, query_start_loc_cpu=starts, query_start_loc=starts, seq_lens_cpu_upper_bound=torch.tensor(lengths)
    )
    plan = plan_prefill(common, 2)  # type: ignore[arg-type]
    assert (plan.first, plan.start, plan.tokens, plan.longest) == (2, 2, 63, 33)
    assert (plan.query_lens, plan.contexts, plan.query_start_loc.tolist()) == ([30, 33], [10, 0], [0, 30, 63])
