"""Prefill of mixed batches against float64: raw own tokens, older context from the pages in several parts, windows, sinks."""

from types import SimpleNamespace

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.format import page_format

from ..kernels.oracle import random_basis
from .shadow import attend, cached

pytestmark = pytest.mark.gpu
# New tokens and older ones of each request; the first two rows of the batch are decodes, which the plan skips.
QUERIES, CONTEXTS = [5, 70, 1, 33, 200], [0, 31, 300, 17, 64]
HEADS, KV_HEADS, BLOCK = 8, 2, 16


@pytest.fixture
def workspace(monkeypatch):
    """Parts of a hundred tokens instead of thousands, so that a context takes several."""
    pytest.importorskip("vllm")
    from vllm.v1.worker.workspace import init_workspace_manager

    from vllm_turboquant import workspace

    init_workspace_manager(torch.device("cuda"))
    monkeypatch.setattr(workspace, "context_tokens", lambda kv_heads, head_size, dtype: 160)


OPTIONS = {
    "plain": {},
    "window in the chunk": {"window": 20},
    "window beyond the chunk": {"window": 120},
    "soft cap": {"soft_cap": 3.0},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 50, "sinks": True},
    "key basis": {"basis": True},
    "window under a key basis": {"window": 50, "basis": True},
    "shared": {"shared": True},
    "shared, window and sinks": {"shared": True, "window": 50, "sinks": True},
    "shared, window under a key basis": {"shared": True, "window": 120, "basis": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("head_size", (64, 128, 256))
@pytest.mark.parametrize(
    ("preset", "loader", "inexact"),
    [
        ("turboquant", "cuda", False),
        ("turboquant", "cuda", True),
        ("turboquant", "portable", True),
        ("turboquant-k8v4", "portable", False),
    ],
)
def test_mixed_batch(workspace, preset, loader, inexact, head_size, option, seed):
    """``inexact``: the host believes in more older tokens than there are, as with a draft model; scratch starts as NaN. Shared:
    another layer has stored the new tokens, and they are read back."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    from vllm_turboquant.kernels.cuda import context as cuda
    from vllm_turboquant.plan import PrefillPlan
    from vllm_turboquant.prefill import attend_prefill
    from vllm_turboquant.workspace import prefill_scratch

    fmt = page_format(preset, head_size)
    g = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda").to(torch.bfloat16)

    basis = None
    if "basis" in OPTIONS[option]:
        # No mean 30 times the keys: raw rows and decoded ones would then both be lost in bf16's rounding of it.
        basis = random_basis(torch.Generator().manual_seed(seed), KV_HEADS, head_size, mean=1.0, buckets=4, bucket=48)
        basis = basis.to(torch.device("cuda"))
    if loader == "cuda":
        assert cuda.prepare(torch.device("cuda", torch.cuda.current_device()), fmt, BLOCK, torch.bfloat16, basis)
    window, sinks = OPTIONS[option].get("window"), OPTIONS[option].get("sinks")
    layer = SimpleNamespace(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=head_size,
        format=fmt,
        scale=head_size**-0.5,
        sliding_window=window,
        logits_soft_cap=OPTIONS[option].get("soft_cap"),
        sinks=normal(HEADS) if sinks else None,
        flash_attention=get_flash_attn_version(head_size=head_size),
        cuda_context_pages={BLOCK} if loader == "cuda" else set(),
        basis=basis,
    )
    tokens = sum(QUERIES)
    query, key, value = normal(tokens, HEADS, head_size), normal(tokens, KV_HEADS, head_size), normal(tokens, KV_HEADS, head_size)
    blocks = 2 + max(-(-(q + c) // BLOCK) for q, c in zip(QUERIES, CONTEXTS, strict=True))
    order = torch.randperm(blocks * (len(QUERIES) + 2), generator=g, device="cuda")
    table = order.view(-1, blocks).to(torch.int32)
    cache = torch.full((order.numel(), KV_HEADS, BLOCK, fmt.slot_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    shared = "shared" in OPTIONS[option]
    ends = [context + new * shared for context, new in zip(CONTEXTS, QUERIES, strict=True)]
    for r, (context, end) in enumerate(zip(CONTEXTS, ends, strict=True)):
        # What the window has passed was freed: it stays 0xFF, whose scales are NaN.
        position = torch.arange(0 if window is None else max(0, context - window + 1), end, device="cuda")
        slots = table[r + 2, position // BLOCK].long() * BLOCK + position % BLOCK
        sides = (normal(len(position), KV_HEADS, head_size) for _ in range(2))
        reference.store(*sides, cache, slots, fmt, basis, position)
    starts = torch.tensor([0, *QUERIES], device="cuda").cumsum(0).to(torch.int32)
    older = torch.tensor(CONTEXTS, dtype=torch.int32, device="cuda")
    bounds = [context + extra for context, extra in zip(CONTEXTS, (1, 0, 3, 3, 2), strict=True)] if inexact else CONTEXTS
    plan = PrefillPlan(2, 2, QUERIES, bounds, starts, older, 4 if inexact else 0)
    for scratch in prefill_scratch(plan.tokens, HEADS, KV_HEADS, head_size, torch.bfloat16, shared):
        scratch.fill_(float("nan"))
    out = torch.full_like(query, float("nan"))
    attend_prefill(layer, plan, query, None if shared else (key, value), cache, table, out)

    for r, (context, end) in enumerate(zip(CONTEXTS, ends, strict=True)):
        rows = slice(int(starts[r]), int(starts[r + 1]))
        oldest = 0 if window is None else max(0, context - window + 1)
        sides = cached(cache, table[r + 2], oldest, end, fmt, basis) if end > oldest else [key[:0].double()] * 2
        if not shared:
            sides = [torch.cat([old, new[rows].double()]) for old, new in zip(sides, (key, value), strict=True)]
        options = (layer.scale, window, layer.logits_soft_cap, layer.sinks)
        truth = attend(query[rows].double(), *sides, *options)
        plain = attend(query[rows], *(x.to(torch.bfloat16) for x in sides), *options)
        ours, torchs = (float((x.double() - truth).norm() / truth.norm()) for x in (out[rows], plain))
        print(f"request {r}: {ours:.1e}, plain torch {torchs:.1e}")
        assert ours <= 2 * torchs, (r, ours, torchs)
