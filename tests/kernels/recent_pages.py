"""Batches whose newest tokens lie in frames and whose pages hold something else from there on."""

from __future__ import annotations

import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.recent_reference import Recent, keep

from .oracle import make_batch, random_basis

# Length, query tokens, where exact tokens begin: none left to the pages, unit and page edges, one exact token, none, padding.
ENDS = [
    (7, 3, 0),
    (90, 3, 1),
    (70, 2, 15),
    (70, 1, 16),
    (40, 2, 17),
    (100, 3, 32),
    (41, 3, 40),
    (41, 3, 38),
    (20, 3, 20),
    (0, 0, 0),
    (64, 1, 63),
]


class RecentTokens:
    """Pages under ``fmt``, and the tokens from ``ends`` on in pools; their codes are overwritten with bytes that would show."""

    def __init__(
        self, fmt, kv_heads, group, block_size, seed, *, window=None, soft_cap=None, sinks=False, buckets=0, device="cpu"
    ):
        g = torch.Generator().manual_seed(seed)
        lengths, new, ends = ([request[i] for request in ENDS] for i in range(3))
        basis = random_basis(g, kv_heads, fmt.head_size, 3.0, buckets, bucket=16) if buckets else None
        batch = make_batch(fmt, lengths, new, kv_heads, group, block_size, seed, basis=basis)
        units = batch.cache.shape[0] * block_size // 16
        frame_of = torch.full((units + 1,), -1, dtype=torch.int32)
        pools = [torch.full((units, 16, kv_heads, fmt.head_size), float("nan")) for _ in range(2)]
        order = torch.randperm(units, generator=g).to(torch.int32)
        for r, (length, _, end) in enumerate(ENDS):
            position = torch.arange(end, length)
            slots = batch.block_table[r, position // block_size].long() * block_size + position % block_size
            frame_of[slots // 16] = order[slots // 16]
            mean = None if basis is None else basis.mean
            keep(batch.keys[r][end:], batch.values[r][end:], slots, *pools, frame_of, mean)
            # Whole units behind the end: NaN scales. Inside a unit: another token's codes.
            whole = slots[position // 16 * 16 >= end]
            fresh = torch.randn(length - end, kv_heads, fmt.head_size, generator=g)
            reference.store(fresh, fresh, batch.cache, slots, fmt, basis, position)
            for unit in (whole // 16).unique().tolist():
                batch.cache[unit * 16 // block_size].view(kv_heads, block_size // 16, -1)[:, unit % (block_size // 16)] = 0xFF
        to = [x.to(device) for x in (batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc)]
        self.batch = batch  # on the CPU
        self.fmt, self.pages, self.query = fmt, tuple(to), batch.query.float().to(device)
        self.ends = torch.tensor([*ends, -7], dtype=torch.int32, device=device)  # longer than the batch, as in serving
        self.recent = Recent(*(x.to(device) for x in (*pools, frame_of)), self.ends)
        self.options = {
            "window": window,
            "soft_cap": soft_cap,
            "basis": None if basis is None else basis.to(torch.device(device)),
        }
        self.options["sinks"] = torch.randn(kv_heads * group, generator=g).to(device) if sinks else None
        self.options["soft_cap"] = soft_cap

    def check(self, out, lse, scale, attend_recent, rtol, atol):
        """``out`` and ``lse`` of the decode without the exact tokens, which are added here. Of rows without a token before those
        the decode says so.
        """
        options = {name: value for name, value in self.options.items() if name != "basis"}
        _, table, lengths, starts = self.pages
        query = self.query.to(out.dtype)
        for r, (length, new, end) in enumerate(ENDS):
            position = torch.arange(length - new, length)
            first = (position - (self.options["window"] or length) + 1).clamp(min=0)
            none = (first >= min(end, length)).to(lse.device)
            rows = lse[int(starts[r]) : int(starts[r]) + new][none]
            if self.options["sinks"] is None:
                assert (rows <= -1e29).all(), rows
            else:
                torch.testing.assert_close(rows, self.options["sinks"].expand_as(rows), rtol=1e-5, atol=1e-5)
        pools = self.recent.key.to(out.dtype), self.recent.value.to(out.dtype)
        size = self.pages[0].shape[2]
        at = self.recent.frame_of, table, lengths, starts, self.ends
        attend_recent(query, out, lse, *pools, *at, scale, size, max(new for _, new, _ in ENDS), **options)
        exact = Recent(*pools, self.recent.frame_of, self.ends)
        truth = reference.attend(query, *self.pages, self.fmt, scale, **self.options, recent=exact)
        torch.testing.assert_close(out.double(), truth, rtol=rtol, atol=atol)
