"""What the prefills of one step read when: planned once for all layers.

The host plans with bounds of lengths, the device knows them exactly: a drafter's host lengths ignore which drafts were
rejected. So the host decides how much room a range gets, and offsets inside it are computed on the device.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass
class ContextPart:
    """Ranges of older context, one for each of the requests ``requests``, that fit the workspace together.

    rows: the requests' query rows, of the prefills. query_start_loc: int32 ``[n + 1]`` on the device, from 0. first: int32
    ``[n]``, each range's first token. key_start_loc: int32 ``[n + 1]``, where ranges stand in the workspace, exact.
    longest_query, longest_key: host bounds. room: tokens of the workspace at most, of which the last ``loose`` may stay empty.
    """

    requests: slice
    rows: slice
    query_start_loc: torch.Tensor
    first: torch.Tensor
    key_start_loc: torch.Tensor
    longest_query: int
    longest_key: int
    room: int
    loose: int


@dataclass
class WindowPart:
    """Rows of one request whose windows fit the workspace: up to ``tail`` older tokens, then the request's rows ``own``.

    Older tokens end at ``tail``. tail_start_loc: int32 ``[2]``, where they start and end. key_start_loc: int32 ``[2]``, where
    all keys do.
    """

    request: int
    rows: slice
    own: slice
    tail: int
    query_start_loc: torch.Tensor
    first: torch.Tensor
    tail_start_loc: torch.Tensor
    key_start_loc: torch.Tensor

    @property
    def longest_key(self) -> int:
        return self.tail + self.own.stop - self.own.start


@dataclass
class PrefillPlan:
    """The prefills of a batch: requests ``first ..`` of it, tokens from ``start`` on.

    query_lens: new tokens of each prefill. bounds: its older tokens, or up to ``inexact`` more. query_start_loc: int32 ``[n +
    1]`` on the device, from 0. contexts: int32 ``[n]`` on the device, older tokens.
    """

    first: int
    start: int
    query_lens: list[int]
    bounds: list[int]
    query_start_loc: torch.Tensor
    contexts: torch.Tensor
    inexact: int = 0
    _parts: dict[int, list[ContextPart]] = field(default_factory=dict)
    _windows: dict[tuple[int, int], list[WindowPart]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def longest(self) -> int:
        return max(self.query_lens)

    def parts(self, capacity: int) -> list[ContextPart]:
        """All older context in parts of at most ``capacity`` tokens."""
        if capacity not in self._parts:
            groups = split_contexts(self.bounds, capacity)
            self._parts[capacity] = [self._part(ranges) for ranges in groups]
        return self._parts[capacity]

    def _part(self, ranges: list[tuple[int, int, int]]) -> ContextPart:
        begin, end = ranges[0][0], ranges[-1][0] + 1
        firsts, rooms = [0] * (end - begin), [0] * (end - begin)
        for request, first, count in ranges:
            firsts[request - begin], rooms[request - begin] = first, count
        lens = self.query_lens[begin:end]
        start = sum(self.query_lens[:begin])
        first, room = self._on_device([firsts, rooms])
        counts = torch.minimum((self.contexts[begin:end] - first).clamp_(min=0), room)
        starts = torch.zeros(len(rooms) + 1, dtype=torch.int32, device=counts.device)
        torch.cumsum(counts, 0, out=starts[1:])
        return ContextPart(
            requests=slice(begin, end),
            rows=slice(start, start + sum(lens)),
            query_start_loc=self.query_start_loc[begin : end + 1] - self.query_start_loc[begin],
            first=first,
            key_start_loc=starts,
            longest_query=max(lens),
            longest_key=max(rooms),
            room=sum(rooms),
            loose=min(sum(rooms), self.inexact * len(ranges)),
        )

    def windows(self, window: int, capacity: int) -> list[WindowPart]:
        """All rows, in runs of one request whose keys within ``window`` number at most ``capacity``."""
        kind = (window, capacity)
        if kind not in self._windows:
            step = capacity - window
            assert step > 0, f"sliding window {window} exceeds the prefill workspace of {capacity} tokens"
            parts: list[WindowPart] = []
            start = 0
            for request, rows in enumerate(self.query_lens):
                parts += [self._window(request, start, begin, min(rows, begin + step), window) for begin in range(0, rows, step)]
                start += rows
            self._windows[kind] = parts
        return self._windows[kind]

    def _window(self, request: int, start: int, begin: int, end: int, window: int) -> WindowPart:
        """Rows ``begin .. end - 1`` of the request whose new tokens start at row ``start``."""
        tail = max(0, min(self.bounds[request], window - 1 - begin))
        own = slice(start + max(0, begin - window + 1), start + end)
        length = tail + own.stop - own.start
        queries, ends = self._on_device([[0, end - begin], [tail, length]])
        context = self.contexts[request : request + 1]
        skipped = (tail - context).clamp_(min=0)
        return WindowPart(
            request=request,
            rows=slice(start + begin, start + end),
            own=own,
            tail=tail,
            query_start_loc=queries,
            first=(context - tail).clamp_(min=0),
            tail_start_loc=torch.cat([skipped, ends[:1]]),
            key_start_loc=torch.cat([skipped, ends[1:]]),
        )

    def _on_device(self, values: list[list[int]]) -> torch.Tensor:
        device = self.contexts.device
        ints = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
        return ints.to(device, non_blocking=True)


def plan_prefill(common: CommonAttentionMetadata, decodes: int, inexact: int = 0) -> PrefillPlan:
    """Reads the host copies of lengths that vLLM keeps; no synchronisation.

    ``inexact``: 0 where they are exact; else they may fall one token short, or exceed by less than so many.
    """
    starts: list[int] = common.query_start_loc_cpu[decodes : common.num_reqs + 1].tolist()
    lengths: list[int] = common.seq_lens_cpu_upper_bound[decodes : common.num_reqs].tolist()
    query_lens = [b - a for a, b in itertools.pairwise(starts)]
    bounds = [max(0, length - rows + (inexact > 0)) for length, rows in zip(lengths, query_lens, strict=True)]
    location = common.query_start_loc[decodes : common.num_reqs + 1]
    contexts = common.seq_lens[decodes : common.num_reqs] - location.diff()
    return PrefillPlan(decodes, starts[0], query_lens, bounds, location - starts[0], contexts, inexact)


def split_contexts(contexts: list[int], capacity: int) -> list[list[tuple[int, int, int]]]:
    """Packs all context tokens into parts of at most ``capacity`` tokens, each request at most once a part.

    Returns, a part, ranges ``(request, first token, count)`` with ascending requests.
    """
    parts: list[list[tuple[int, int, int]]] = []
    room = 0
    for request, context in enumerate(contexts):
        done = 0
        while done < context:
            if room == 0 or not parts or parts[-1][-1][0] == request:
                parts.append([])
                room = capacity
            count = min(context - done, room)
            parts[-1].append((request, done, count))
            room -= count
            done += count
    return parts


def drafts_with_a_model(vllm_config: VllmConfig) -> bool:
    """Whether a draft model speculates. Its first pass asks for a token more than the host's lengths, the target's, know of."""
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.uses_draft_model()
