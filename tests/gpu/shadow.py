"""Attention as it ought to be, beside every attention call of a running engine: float64 over the decoded cache.

`install` wraps the GPU path in this process; each call is computed again in float64 and in plain torch of the model's own
precision from the same keys and values, and the two errors are noted. Decodes and verified drafts read everything from the
pages; prefills read their own tokens raw and older context from the pages, but for layers that share another layer's cache.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from vllm_turboquant.kernels import reference

Errors = dict[str, list[tuple[float, float]]]


def attend(q, k, v, scale, window=None, soft_cap=None, sinks=None):
    """Causal, rows aligned to the end; q ``[R, Hq, d]``, k and v ``[L, Hk, d]`` of one dtype; the softmax in fp32 or wider."""
    rows, length, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("rhd,lhd->hrl", q, k).to(wide) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    position = torch.arange(length - rows, length, device=q.device)[:, None]
    column = torch.arange(length, device=q.device)
    visible = column <= position
    if window is not None:
        visible &= column > position - window
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide).view(-1, 1, 1).expand(-1, rows, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :length].to(q.dtype)
    return torch.einsum("hrl,lhd->rhd", weights, v)


def cached(cache, blocks, first, length, fmt, basis=None):
    """Keys and values ``first .. length - 1`` of a request, float64, in the model's basis; reads no other block."""
    size = cache.shape[2]
    skip = first % size
    wanted = range(first // size, -(-length // size))
    starts = torch.tensor([size * block for block in wanted], device=cache.device)
    loaded = reference.load_vectors(cache, blocks[wanted.start : wanted.stop].long(), fmt, basis, starts)
    return [x[skip : skip + length - first] for x in loaded]


def exact(impl, recent, cache, blocks, first, length):
    """Keys and values ``first .. length - 1`` of a request as the layer's pools hold them, float64, in the model's basis."""
    size = cache.shape[2]
    position = torch.arange(first, length, device=cache.device)
    slots = blocks[position // size].long() * size + position % size
    frames = recent.frame_of[slots // 16].long()
    assert (frames >= 0).all(), "from `ends` on every token has a frame"
    key, value = (pool[frames, slots % 16].double() for pool in (impl.recent.key, impl.recent.value))
    return (key if impl.basis is None else key + impl.basis.mean.double()), value


def install() -> Errors:
    """Errors by kind of request (decode, verify, first, continued): (ours, plain torch's), relative to the float64 norm."""
    from vllm_turboquant.impl import TurboQuantImpl

    errors: Errors = defaultdict(list)
    real = TurboQuantImpl._forward_gpu

    def forward(self, query, key, value, kv_cache, meta, out):
        real(self, query, key, value, kv_cache, meta, out)
        starts, lengths = meta.query_start_loc.tolist(), meta.seq_lens.tolist()
        for r, length in enumerate(lengths):
            rows = slice(starts[r], min(starts[r + 1], meta.num_actual_tokens))
            count = rows.stop - rows.start
            if count <= 0 or length <= 0:
                continue
            context, decoding = length - count, r < meta.decodes
            oldest = 0 if self.sliding_window is None else max(0, context - self.sliding_window + 1)
            raw = not decoding and key is not None  # a layer that shares another's cache has none of its own
            end = max(context, oldest) if raw else length
            sides = cached(kv_cache, meta.block_table[r], oldest, end, self.format, self.basis)
            if decoding and meta.recent is not None:
                newest = max(int(meta.recent.ends[r]), oldest)
                kept = exact(self, meta.recent, kv_cache, meta.block_table[r], newest, length)
                sides = [torch.cat([old[: newest - oldest], new]) for old, new in zip(sides, kept, strict=True)]
            if raw:
                sides = [torch.cat([old, new[rows].double()]) for old, new in zip(sides, (key, value), strict=True)]
            options = (self.scale, self.sliding_window, self.logits_soft_cap, self.sinks)
            truth = attend(query[rows].double(), *sides, *options)
            plain = attend(query[rows], *(x.to(query.dtype) for x in sides), *options)
            kind = ("verify" if count > 1 else "decode") if decoding else ("continued" if context else "first")
            norm = float(truth.norm())
            if norm == 0:  # vLLM's warm-up, over an empty cache
                assert not out[rows].any()
                continue
            ours, torchs = (float((x.double() - truth).norm()) / norm for x in (out[rows], plain))
            errors[kind].append((ours, torchs))

    TurboQuantImpl._forward_gpu = forward
    return errors
