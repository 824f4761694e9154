"""Serving as vLLM does it, with tokens that are numbers, and a slow model of which of them frames hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

UNIT = 16


@dataclass
class Request:
    prompt: list[int]  # what it asks for: equal beginnings share pages
    target: int
    blocks: list[int] = field(default_factory=list)
    stored: int = 0  # tokens whose slots hold what they should
    written_from: int = 0  # the first position that it wrote itself since it (re)started
    ids: dict[int, int] = field(default_factory=dict)  # what is in the slot of each position


@dataclass
class Row:
    """A request in a batch. request: None in dummy batches. ids: of the new tokens, unique for every write."""

    request: Request | None
    length: int
    new: int
    table: list[int]
    slots: list[int]
    ids: list[int]


class Serving:
    """Requests that start, share full pages, prefill in chunks, speculate, wait, are preempted and end; pages go round."""

    RUNNING = 5

    def __init__(self, rng, blocks, block_size, max_query_len, everyone):
        self.rng, self.size, self.max_query_len, self.everyone = rng, block_size, max_query_len, everyone
        self.free = list(range(blocks))  # oldest first; cached until given out again
        self.users = [0] * blocks
        self.cached: dict[tuple[int, ...], int] = {}
        self.running: list[Request] = []
        self.slots: dict[int, int] = {}
        self.next_id = 0
        self.leftover: list[Row] = []

    def allocate(self):
        block = self.free.pop(0)
        self.cached = {prefix: b for prefix, b in self.cached.items() if b != block}
        self.users[block] = 1
        return block

    def share(self, block):
        if not self.users[block]:
            self.free.remove(block)
        self.users[block] += 1

    def release(self, request):
        for block in reversed(request.blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        self.running.remove(request)

    def start(self):
        base = self.rng.randrange(3)
        shared = self.rng.choice((0, 10, 70, 130))
        prompt = [base] * shared + [self.rng.randrange(3, 1000) for _ in range(self.rng.randrange(1, 60))]
        request = Request(prompt, len(prompt) + self.rng.randrange(1, 60))
        # The last token is always computed.
        for end in range(self.size, len(prompt), self.size):
            block = self.cached.get(tuple(prompt[:end]))
            if block is None:
                break
            self.share(block)
            request.blocks.append(block)
            request.stored = end
        request.written_from = request.stored
        self.running.append(request)
        return request

    def slot(self, request, position):
        return request.blocks[position // self.size] * self.size + position % self.size

    def step(self):
        """The rows of a batch whose tokens then count as written."""
        if self.leftover and self.rng.random() < 0.1:
            return [self.dummy(row.table) for row in self.rng.choices(self.leftover, k=3)]
        for request in list(self.running):
            if request.stored >= request.target:
                self.release(request)
        while len(self.running) < self.RUNNING and len(self.free) > 3 and self.rng.random() < 0.5:
            self.start()
        batch = []
        queue = list(self.running)
        while queue:
            request = queue.pop(0)
            if request not in self.running or (not self.everyone and self.rng.random() < 0.2):
                continue
            row = self.schedule(request, {id(row.request) for row in batch})
            if row is not None:
                batch.append(row)
            if len(self.running) < self.RUNNING and len(self.free) > 3 and self.rng.random() < 0.5:
                queue.append(self.start())  # may share what this very batch stores
        self.rng.shuffle(batch)
        self.leftover = (batch + self.leftover)[:10]
        return batch

    def dummy(self, table):
        """Stores nothing; its length and table are what some batch left."""
        length = self.rng.randint(1, len(table) * self.size)
        if self.rng.random() < 0.3:
            length, table = len(table) * self.size, [-1] * len(table)
        new = self.rng.randint(1, min(length, self.max_query_len + 2))
        return Row(None, length, new, table, [-1] * new, [])

    def schedule(self, request, scheduled):
        left = len(request.prompt) - request.stored
        decodes = left <= 1
        new = self.rng.randint(1, self.max_query_len) if decodes else self.rng.randint(1, min(left, 90))
        length = request.stored + new
        while len(request.blocks) * self.size < length:
            while not self.free:
                victims = [r for r in self.running if r is not request and id(r) not in scheduled]
                if not victims:
                    if self.everyone:
                        self.release(request)
                    return None
                self.release(self.rng.choice(victims))
            request.blocks.append(self.allocate())
        first = request.stored
        slots = [self.slot(request, position) for position in range(first, length)]
        ids = list(range(self.next_id, self.next_id + new))
        self.next_id += new
        for position, slot, i in zip(range(first, length), slots, ids, strict=True):
            self.slots[slot] = request.ids[position] = i
        # vLLM shares a full page from the moment it is scheduled: requests of this very batch may find it.
        for end in range(self.size, min(length, len(request.prompt)) + 1, self.size):
            self.cached.setdefault(tuple(request.prompt[:end]), request.blocks[end // self.size - 1])
        for position in range(request.written_from):
            request.ids[position] = self.slots[self.slot(request, position)]
        request.stored = length - self.rng.randrange(new) if decodes else length  # drafts that were rejected
        table = request.blocks[: -(-length // self.size)]
        return Row(request, length, new, table, slots, ids)


def as_tensors(batch, rng):
    """What vLLM hands over of a batch: padded with requests of length 0, tables that end in anything, slots of -1."""
    pad = rng.randrange(3) if batch else 1
    width = max([len(row.table) for row in batch], default=1) + rng.randrange(2)
    table = [row.table + rng.choices((-1, 0, 12345678), k=width - len(row.table)) for row in batch] + [[-1] * width] * pad
    starts = [0]
    for row in batch:
        starts.append(starts[-1] + row.new)
    slots = [slot for row in batch for slot in row.slots] + [-1] * (rng.randrange(4) if batch else 1)
    int32 = {"dtype": torch.int32}
    return (
        torch.tensor(table, **int32),
        torch.tensor([row.length for row in batch] + [0] * pad, **int32),
        torch.tensor(starts + starts[-1:] * pad, **int32),
        torch.tensor(slots, dtype=torch.int64),
    )


class Truth:
    """`RecentUnits` in words, one unit after the other, and the tokens that frames and slots really hold."""

    def __init__(self, units, frames, window, max_query_len, block_size):
        self.frames, self.window, self.max_query_len, self.size = frames, window, max_query_len, block_size
        self.frame_of: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.stamp = [0] * frames
        self.step = 0
        self.pool: dict[tuple[int, int], int] = {}

    def unit(self, row, position):
        return (row.table[position // self.size] * self.size + position % self.size) // UNIT

    def claim(self, batch):
        """``ends`` of each row."""
        if not batch:
            self.step += 1
            return []
        self.step += 1
        oldest = [max(row.length - self.window - self.max_query_len + 1, 0) for row in batch]
        needs: list[dict[int, int]] = []  # of each row, unit -> where in the sequence it begins
        for row, old in zip(batch, oldest, strict=True):
            writes = bool(row.slots) and row.slots[-1] >= 0 and row.slots[-1] // UNIT == self.unit(row, row.length - 1)
            needs.append({self.unit(row, p): p // UNIT * UNIT for p in range(old, row.length)} if writes else {})
        for need in needs:
            for unit in need:
                if unit in self.frame_of:
                    self.stamp[self.frame_of[unit]] = self.step
        for row, need in zip(batch, needs, strict=True):
            for slot in row.slots:
                if slot >= 0 and slot // UNIT not in need:
                    self.frame_of.pop(slot // UNIT, None)
        free = sorted((f for f in range(self.frames) if self.stamp[f] < self.step), key=lambda f: (self.stamp[f], f))
        for row, need in zip(batch, needs, strict=True):
            for unit, start in need.items():
                new_from = max(row.length - row.new - start, 0)
                if new_from >= UNIT:
                    continue
                if unit in self.frame_of:
                    frame = self.frame_of[unit]
                    self.first[frame] = min(self.first[frame], new_from)
                elif free:
                    frame = free.pop(0)
                    self.frame_of = {u: f for u, f in self.frame_of.items() if f != frame}
                    self.frame_of[unit], self.first[frame], self.stamp[frame] = frame, new_from, self.step
        ends = []
        for row, old, need in zip(batch, oldest, needs, strict=True):
            end = row.length
            if need and row.new <= self.max_query_len:
                while end > old and self.claims(self.unit(row, end - 1), (end - 1) % UNIT):
                    end -= 1
            ends.append(end)
        return ends

    def claims(self, unit, token):
        return unit in self.frame_of and token >= self.first[self.frame_of[unit]]

    def keep(self, batch):
        for row in batch:
            for slot, i in zip(row.slots, row.ids, strict=False):
                if slot // UNIT in self.frame_of:
                    self.pool[self.frame_of[slot // UNIT], slot % UNIT] = i

    def exact(self, row, position):
        frame = self.frame_of.get(self.unit(row, position))
        return frame is not None and self.pool.get((frame, position % UNIT)) == row.request.ids[position]

    def check(self, serving):
        """Whatever frames claim of running requests' tokens and of pages that wait for another request is in the slots."""
        places = {serving.slot(r, p) for r in serving.running for p in range(r.stored)}
        places |= {block * self.size + n for block in serving.cached.values() for n in range(self.size)}
        for slot in places:
            if self.claims(slot // UNIT, slot % UNIT):
                assert self.pool[self.frame_of[slot // UNIT], slot % UNIT] == serving.slots[slot], slot
