"""The CUDA decode beside exact tokens, its sources run on the CPU; attention to those in Triton's interpreter."""

import pytest
import torch

from vllm_turboquant.kernels.format import page_format

from . import emulated
from .interpreted import attend_recent, interpret  # noqa: F401
from .recent_pages import RecentTokens

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("options", ({}, {"window": 5}, {"window": 40}, {"soft_cap": 2.0}, {"sinks": True}, {"buckets": 3}))
@pytest.mark.parametrize(("preset", "head_size", "block_size"), (("turboquant-k3v3", 128, 32), ("turboquant-k2v2", 64, 16)))
def test_beside_recent_tokens(preset, head_size, block_size, options, seed):
    """Tokens from ``ends`` on are left out, and their pages not read; what attention to the exact ones needs is left behind."""
    beside = RecentTokens(page_format(preset, head_size), 2, 3, block_size, seed, **options)
    query, lse = beside.query.to(torch.bfloat16), torch.full(beside.query.shape[:2], float("nan"))
    for grid in (3, 40):
        out = emulated.decode(beside.batch, query, 0.3, 3, grid=grid, **beside.options, ends=beside.ends, lse=lse)
        beside.check(out, lse, 0.3, attend_recent, rtol=2**-6, atol=2**-6)
