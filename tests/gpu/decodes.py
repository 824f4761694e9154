"""Both decodes, portable and CUDA, made ready for a batch and run; what they are compared with."""

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.cuda.variant import supported

from .shadow import attend, cached

# Around page (32) and unit (16) edges and, with several splits, around split edges.
LENGTHS = [8, 15, 16, 17, 31, 32, 33, 64, 255, 256, 257, 600]


def prepared(which, batch, dtype, max_query_len, **options):
    """The kernel's decode and its scratch, full of NaN. The CUDA decode must be usable: a fallback is a failure here."""
    from vllm_turboquant.kernels.combine import plan_decode
    from vllm_turboquant.kernels.cuda import launch
    from vllm_turboquant.kernels.decode import decode

    tokens, heads, d = batch.query.shape
    kv_heads, block_size = batch.cache.shape[1:3]
    device = torch.device("cuda", torch.cuda.current_device())
    if which == "cuda":
        if "sinks" in options:
            options["sinks"] = options["sinks"].dtype
        assert launch.prepare(device, batch.fmt, block_size, dtype, heads // kv_heads, max_query_len, **options)
        rows = 0 if options.get("basis") is None else tokens * heads
        decode, floats = launch.decode, launch.scratch_floats(heads // kv_heads, d, max_query_len, device, rows)
    else:
        floats = plan_decode(batch.seq_lens.shape[0], tokens, heads, kv_heads, d, max_query_len).floats
    return decode, torch.full((floats,), float("nan"), device="cuda")


def skip_unsupported(which, fmt):
    if which == "cuda" and not supported(fmt, 32, 4, 1):
        pytest.skip("the portable decode alone covers this format")


def kernel(which, batch, dtype, max_query_len, scale, **options):
    decode, scratch = prepared(which, batch, dtype, max_query_len, **options)
    query = batch.query.to(dtype)
    out = torch.full_like(query, float("nan"))
    decode(
        query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        out,
        scratch,
        batch.fmt,
        scale,
        max_query_len,
        **options,
    )
    return out


def oracle(batch, dtype, scale, **options):
    query = batch.query.to(dtype).double()
    return reference.attend(
        query, batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.fmt, scale, **options
    )


def plain_torch(batch, dtype, scale, basis=None):
    """Attention of the same decoded cache in ``dtype``: what an uncompressed engine computes, rounding included."""
    out = torch.zeros_like(batch.query, dtype=dtype)
    starts = batch.query_start_loc.tolist()
    for r, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[r], starts[r + 1])
        if rows.stop > rows.start and length:
            keys, values = cached(batch.cache, batch.block_table[r], 0, length, batch.fmt, basis)
            out[rows] = attend(batch.query[rows].to(dtype), keys.to(dtype), values.to(dtype), scale)
    return out


def first_heads(x, kv_heads, group):
    """``[T, kv_heads * 16, d]`` to the first ``group`` query heads of each KV head."""
    return x.unflatten(1, (kv_heads, 16))[:, :, :group].flatten(1, 2)


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm())
