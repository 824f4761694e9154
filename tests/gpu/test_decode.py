"""Both decodes, portable and CUDA, against the float64 oracle over the decoded cache; error at most twice that of plain torch."""

from dataclasses import replace

import pytest
import torch

from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format

from ..kernels.oracle import make_batch, random_basis
from ..kernels.test_basis import HEADS
from .decodes import LENGTHS, first_heads, kernel, oracle, plain_torch, relative, skip_unsupported

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("head_size", (64, 96, 128, 256))
@pytest.mark.parametrize(
    ("preset", "dtype"), [*((name, torch.bfloat16) for name in (*PRESETS, LOSSLESS_PRESET)), ("turboquant", torch.float16)]
)
def test_grid(which, preset, head_size, dtype, seed):
    """Query lengths x KV heads x group sizes over ragged lengths, in padded pools full of 0xFF, tables ending in -1."""
    fmt = page_format(preset, head_size)
    skip_unsupported(which, fmt)
    scale = head_size**-0.5
    worst = 0.0
    for kv_heads in (1, 2, 4, 8):
        for query_len in (1, 2, 3, 5, 8):
            lengths = [max(length, query_len) for length in LENGTHS]
            # Query heads know nothing of each other: the first of sixteen are any smaller group's, and so is their truth.
            whole = make_batch(fmt, lengths, [query_len] * len(lengths), kv_heads, 16, 32, seed, device="cuda")
            whole_truth, whole_plain = oracle(whole, dtype, scale), plain_torch(whole, dtype, scale)
            for group in (1, 2, 4, 6, 7, 8, 16):
                query, truth, plain = (first_heads(x, kv_heads, group) for x in (whole.query, whole_truth, whole_plain))
                batch = replace(whole, query=query)
                ours, torchs = relative(kernel(which, batch, dtype, query_len, scale), truth), relative(plain, truth)
                worst = max(worst, ours / torchs)
                assert ours <= 2 * torchs, (kv_heads, query_len, group, ours, torchs)
    print(f"{which} {preset} d={head_size} {dtype}: at most {worst:.2f} of plain torch's error")


@pytest.mark.parametrize("head_size", (80, 112, 160, 192, 512, 576))
@pytest.mark.parametrize("preset", PRESETS)
def test_other_head_sizes(preset, head_size, seed):
    fmt = page_format(preset, head_size)
    batch = make_batch(fmt, [17, 300], [1, 3], 2, 3, 16, seed, device="cuda")
    truth = oracle(batch, torch.bfloat16, 0.1)
    ours = relative(kernel("portable", batch, torch.bfloat16, 3, 0.1), truth)
    assert ours <= 2 * relative(plain_torch(batch, torch.bfloat16, 0.1), truth)


@pytest.mark.parametrize("head_size", (64, 128, 256))
@pytest.mark.parametrize(("preset", "dtype"), [*((name, torch.bfloat16) for name in PRESETS), ("turboquant", torch.float16)])
def test_under_a_key_basis(which, preset, head_size, dtype, seed):
    """Anisotropic bases; keys around a mean of size 30, with which plain torch loses much, and around none; group sizes and
    query lengths of one MMA tile and of more."""
    fmt = page_format(preset, head_size)
    skip_unsupported(which, fmt)
    buckets = 1 if dtype == torch.float16 else 20
    fitted = random_basis(torch.Generator().manual_seed(seed), HEADS, head_size, buckets=buckets).to(torch.device("cuda"))
    worst = 0.0
    for group, query_len in ((1, 1), (4, 1), (6, 1), (16, 1), (4, 3), (2, 8)):
        basis = fitted if group == 1 else replace(fitted, means=torch.zeros_like(fitted.means))
        lengths = [max(length, query_len) for length in LENGTHS]
        batch = make_batch(fmt, lengths, [query_len] * len(lengths), HEADS, group, 32, seed, device="cuda", basis=basis)
        scale = head_size**-0.5
        truth = oracle(batch, dtype, scale, basis=basis)
        ours = relative(kernel(which, batch, dtype, query_len, scale, basis=basis), truth)
        torchs = relative(plain_torch(batch, dtype, scale, basis), truth)
        worst = max(worst, ours / torchs)
        assert ours <= 2 * torchs, (group, query_len, ours, torchs)
    print(f"{which} {preset} d={head_size} {dtype} under a basis: at most {worst:.2f} of plain torch's error")


@pytest.mark.parametrize("options", ({"window": 1}, {"window": 7}, {"window": 100}, {"soft_cap": 2.0}, {"sinks": True}))
def test_window_soft_cap_and_sinks(which, options, seed):
    batch = make_batch(
        page_format("turboquant", 128), LENGTHS, [1, 2, 3, 5, 8, 1, 2, 3, 5, 8, 1, 2], 2, 4, 16, seed, device="cuda"
    )
    if "sinks" in options:
        options = {"sinks": torch.randn(8, device="cuda")}
    truth = oracle(batch, torch.bfloat16, 0.3, **options)
    # bf16 rounds the output by 2**-9 and the queries alike.
    assert relative(kernel(which, batch, torch.bfloat16, 8, 0.3, **options), truth) < 2**-8
