"""Which units of the pages have a frame: a bounded pool that holds the newest tokens of running requests exactly.

A unit is 16 consecutive slots of a page, numbered through all pages: ``slot // 16``. Every token is stored as codes as well, so a
unit may lose its frame at any time; a frame must never outlive what its unit's slots hold.
"""

from __future__ import annotations

import torch

from .format import UNIT_TOKENS


def units_needed(window: int, max_query_len: int) -> int:
    """Units that the newest ``window + max_query_len - 1`` tokens of a request touch at most."""
    return (window + max_query_len - 1 + UNIT_TOKENS - 2) // UNIT_TOKENS + 1


def frames_needed(requests: int, window: int, max_query_len: int) -> int:
    """Frames with which no step of up to ``requests`` requests runs out of them."""
    return requests * units_needed(window, max_query_len)


def frame_bytes(kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Bytes of one frame of one layer, keys and values together."""
    return 2 * UNIT_TOKENS * kv_heads * head_size * dtype.itemsize


def check_pools(recent_key: torch.Tensor, recent_value: torch.Tensor, kv_heads: int, d: int) -> None:
    """Asserts that a layer's pools are ``[F, 16, kv_heads, d]`` and contiguous."""
    assert recent_key.is_contiguous() and recent_value.is_contiguous() and recent_key.dtype == recent_value.dtype
    assert recent_key.shape == recent_value.shape and recent_key.shape[1:] == (UNIT_TOKENS, kv_heads, d), recent_key.shape


class RecentUnits:
    """Frames of the units of all layers that share a block table. A layer's pools are ``[frames, 16, Hk, d]``.

    All tensors are on ``device``. Four have an entry at their end for masked scatters and gathers, which always says "none".

    frame_of: int32 ``[units + 1]``, the frame of each unit or -1. owner: int64 ``[frames + 1]``, the unit of each frame or -1;
    a frame is live while ``frame_of[owner[f]] == f``. first: int32 ``[frames + 1]``, from which token of the unit (0 to 15) on a
    live frame holds what the slots do, up to the length of the sequence. stamp: int64 ``[frames + 1]``, the step that last needed
    the frame. step: int64 ``[]``. ends: int32 ``[max_requests]``, always the same memory: the position in each request of the
    last batch from which on frames hold all its tokens; its length where they hold none.
    """

    def __init__(
        self, units: int, frames: int, max_requests: int, window: int, max_query_len: int, block_size: int, device: torch.device
    ) -> None:
        """units: of all pages. window: tokens before and with each query token that shall be exact; query tokens: of a request in
        a decode, at most max_query_len. block_size: slots of a page, a multiple of 16."""
        assert frames > 0 and window > 0 and max_query_len > 0 and block_size % UNIT_TOKENS == 0
        self.units, self.frames = units, frames
        self.window, self.max_query_len, self.block_size = window, max_query_len, block_size
        self.frame_of = torch.full((units + 1,), -1, dtype=torch.int32, device=device)
        self.owner = torch.full((frames + 1,), -1, dtype=torch.int64, device=device)
        self.first = torch.full((frames + 1,), UNIT_TOKENS, dtype=torch.int32, device=device)
        self.stamp = torch.zeros(frames + 1, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.ends = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._ordinal = torch.arange(units_needed(window, max_query_len), device=device)

    def claim(
        self, block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Gives frames to the newest units of a batch and writes ``ends[:R]``; once a step, before any layer stores its tokens.

        block_table: int32 ``[R, *]``; entries past a length are not used. seq_lens: int32 ``[R]``, new tokens included; 0 in
        padded rows. query_start_loc: int32 ``[R + 1]``. slot_mapping: int64 ``[T]``, T >= query_start_loc[R]; negative in padding
        and where nothing is stored. Never waits for the device, and no shape depends on data.

        A unit that a request needs and fills gets a frame as long as frames are left that this batch does not need, those least
        recently needed first. A unit that is filled and not needed loses its frame. Requests whose last token is not stored where
        their block table says need nothing: dummy batches come with leftover tables. Requests of more than ``max_query_len`` new
        tokens get frames, but ``ends`` of their length: they are not decoded.
        """
        requests = seq_lens.shape[0]
        if requests == 0 or slot_mapping.shape[0] == 0:
            return
        begin, end = query_start_loc[:-1], query_start_loc[1:]
        new = end - begin
        oldest = (seq_lens - (self.window + self.max_query_len - 1)).clamp(min=0)
        # [R, S], S consecutive units of each request: where in the sequence they begin, and which ones they are.
        place = oldest[:, None] // UNIT_TOKENS + self._ordinal
        start = place * UNIT_TOKENS
        per_block = self.block_size // UNIT_TOKENS
        block = block_table.gather(1, (place // per_block).clamp(max=block_table.shape[1] - 1))
        unit = torch.add(place % per_block, block, alpha=per_block)
        rest = seq_lens[:, None] - start
        needed = (rest > 0) & (unit >= 0)
        last_unit = slot_mapping[end - 1] // UNIT_TOKENS
        writes = (needed & (rest <= UNIT_TOKENS) & (unit == last_unit[:, None])).any(1) & (new > 0)
        needed &= writes[:, None]
        offset = (rest - new[:, None]).clamp(min=0)  # of the first new token in each unit; 16 or more: none
        fills, offset = (needed & (offset < UNIT_TOKENS)).flatten(), offset.to(torch.int32).flatten()
        unit = torch.where(needed, unit, -1).flatten()
        # From here on everything is [R * S], and an index of -1 means the entry for masked scatters.

        # Units that are filled lose their frames, and get them back only where a request fills what it needs: other units' frames
        # hold what was there before. Another request of this batch may need such a unit as well, as a prefix that it shares.
        frame = self.frame_of[unit].to(torch.int64)
        filled = slot_mapping.clamp(min=-1) // UNIT_TOKENS
        self.owner.index_fill_(0, self.frame_of[filled].to(torch.int64), -1)
        self.frame_of.index_fill_(0, filled, -1)
        self.step += 1
        self.stamp[frame] = self.step

        claims = fills & (frame < 0)
        rank = claims.cumsum(0) - 1
        # Frames that this batch needs have the newest stamp and come last.
        taken = self.stamp[:-1].argsort(stable=True)[rank.clamp(max=self.frames - 1)]
        claims &= (rank < self.frames) & (self.stamp[taken] < self.step)
        taken = torch.where(claims, taken, -1)
        self.frame_of.index_fill_(0, self.owner[taken], -1)

        frame = torch.where(fills, torch.maximum(frame, taken), -1)
        got = frame >= 0
        first = torch.where(claims, offset, torch.minimum(self.first[frame], offset))
        unit_of = torch.where(got, unit, -1)
        self.frame_of[unit_of] = frame.to(torch.int32)
        self.owner[frame] = unit_of
        self.first[frame] = torch.where(got, first, UNIT_TOKENS)
        self.stamp[frame] = self.step

        # Looked up anew: a request may share a unit that another one has just claimed.
        missing = self.first[self.frame_of[unit]].view(start.shape)
        inexact = torch.where(needed & (missing > 0), start + missing, 0).amax(1)
        least = torch.where(writes & (new <= self.max_query_len), oldest, seq_lens)
        self.ends[:requests] = inexact.maximum(least).minimum(seq_lens)
