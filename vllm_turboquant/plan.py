"""What the prefills of one step read when: planned on the host from lengths that vLLM keeps there, once for all layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass
class ContextPart:
    """Ranges of older context that fit the workspace together, and the query rows that attend to them.

    ranges: ``(request, first token, count)``, ascending requests. rows: of the prefills. query_start_loc, key_start_loc:
    int32 on the device, from 0, over the requests from the first to the last of ``ranges``.
    """

    ranges: list[tuple[int, int, int]]
    rows: slice
    query_start_loc: torch.Tensor
    key_start_loc: torch.Tensor
    longest_query: int
    longest_key: int


@dataclass
class WindowPart:
    """Rows of one request whose windows fit the workspace: ``tail`` older tokens from ``oldest`` on, then the rows ``own``."""

    request: int
    rows: slice
    own: slice
    oldest: int
    tail: int
    query_start_loc: torch.Tensor
    key_start_loc: torch.Tensor

    @property
    def longest_key(self) -> int:
        return self.tail + self.own.stop - self.own.start


@dataclass
class PrefillPlan:
    """The prefills of a batch: requests ``first ..`` of it, tokens from ``start`` on.

    query_lens, contexts: host ints per prefill (new tokens, older tokens). query_start_loc: int32 ``[n + 1]`` on the
    device, from 0.
    """

    first: int
    start: int
    query_lens: list[int]
    contexts: list[int]
    query_start_loc: torch.Tensor
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
            groups = split_contexts(self.contexts, capacity)
            self._parts[capacity] = [self._part(ranges) for ranges in groups]
        return self._parts[capacity]

    def _part(self, ranges: list[tuple[int, int, int]]) -> ContextPart:
        begin, end = ranges[0][0], ranges[-1][0] + 1
        counts = [0] * (end - begin)
        for request, _, count in ranges:
            counts[request - begin] = count
        lens = self.query_lens[begin:end]
        start = sum(self.query_lens[:begin])
        return ContextPart(
            ranges=ranges,
            rows=slice(start, start + sum(lens)),
            query_start_loc=self._on_device(_offsets(lens)),
            key_start_loc=self._on_device(_offsets(counts)),
            longest_query=max(lens),
            longest_key=max(counts),
        )

    def windows(self, window: int, capacity: int) -> list[WindowPart]:
        """All rows, in runs of one request whose keys within ``window`` number at most ``capacity``."""
        kind = (window, capacity)
        if kind not in self._windows:
            step = capacity - window
            assert step > 0, f"sliding window {window} exceeds the prefill workspace of {capacity} tokens"
            parts: list[WindowPart] = []
            start = 0
            for request, (rows, context) in enumerate(zip(self.query_lens, self.contexts, strict=True)):
                parts += [
                    self._window(request, start, begin, min(rows, begin + step), context, window)
                    for begin in range(0, rows, step)
                ]
                start += rows
            self._windows[kind] = parts
        return self._windows[kind]

    def _window(self, request: int, start: int, begin: int, end: int, context: int, window: int) -> WindowPart:
        """Rows ``begin .. end - 1`` of the request that starts at row ``start`` after ``context`` older tokens."""
        oldest = max(0, context + begin - window + 1)
        tail = max(0, context - oldest)
        own = slice(start + max(0, oldest - context), start + end)
        return WindowPart(
            request=request,
            rows=slice(start + begin, start + end),
            own=own,
            oldest=oldest,
            tail=tail,
            query_start_loc=self._on_device([0, end - begin]),
            key_start_loc=self._on_device([0, tail + own.stop - own.start]),
        )

    def _on_device(self, values: list[int]) -> torch.Tensor:
        device = self.query_start_loc.device
        ints = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
        return ints.to(device, non_blocking=True)


def plan_prefill(common: CommonAttentionMetadata, decodes: int) -> PrefillPlan:
    """Reads the host copies of lengths that vLLM keeps; no synchronisation."""
    starts: list[int] = common.query_start_loc_cpu[decodes : common.num_reqs + 1].tolist()
    lengths: list[int] = common.seq_lens_cpu_upper_bound[decodes : common.num_reqs].tolist()
    query_lens = [b - a for a, b in itertools.pairwise(starts)]
    contexts = [length - rows for length, rows in zip(lengths, query_lens, strict=True)]
    location = common.query_start_loc[decodes : common.num_reqs + 1] - starts[0]
    return PrefillPlan(decodes, starts[0], query_lens, contexts, location)


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


def _offsets(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]
