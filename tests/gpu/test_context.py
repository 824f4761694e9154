"""Older context, decoded into the workspace that FlashAttention reads, against the reference."""

import pytest
import torch

from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format

from ..kernels.oracle import make_batch
from .shadow import cached

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", (*PRESETS, LOSSLESS_PRESET))
@pytest.mark.parametrize("head_size", (64, 80, 128, 256, 576))
def test_context_is_decoded_into_the_models_basis(preset, head_size, seed):
    from vllm_turboquant.kernels.prefill import load_context

    fmt = page_format(preset, head_size)
    batch = make_batch(fmt, [300], [1], 2, 1, 32, seed, device="cuda")
    keys, values = cached(batch.cache, batch.block_table[0], 0, 300, fmt)
    for dtype in (torch.bfloat16, torch.float16):
        firsts, counts = [0, 17, 9, 31, 256], [300, 1, 0, 100, 44]
        first = torch.tensor(firsts, dtype=torch.int32, device="cuda")
        starts = torch.tensor([2, *counts], device="cuda").cumsum(0).to(torch.int32)
        total = 2 + sum(counts)
        k, v = (torch.full((total + 3, 2, head_size), float("nan"), device="cuda", dtype=dtype) for _ in range(2))
        load_context(batch.cache, batch.block_table.expand(5, -1), first, starts, max(counts), k, v, fmt)
        for mine, truth in ((k, keys), (v, values)):
            assert mine[:2].isnan().all() and mine[total:].isnan().all()
            expected = torch.cat([truth[f : f + n] for f, n in zip(firsts, counts, strict=True)])
            # tf32 rounds the decoded vector and the rotation by 2**-12 each; the output type by 2**-9 or 2**-12.
            assert float((mine[2:total].double() - expected).norm() / expected.norm()) < 2**-8.5
