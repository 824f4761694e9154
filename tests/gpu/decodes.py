"""Both decodes, portable and CUDA, made ready for a batch."""

import torch


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
