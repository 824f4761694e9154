"""Decode attention of others on the same shapes: FlashAttention 3 in bf16 and fp8, vLLM's own TurboQuant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from vllm_turboquant.kernels.format import DEFAULT_PRESET

from .shapes import Shape, lengths_of, milliseconds, table_of

RIVAL_BLOCK = 16
SPARE_BYTES = 4 * 2**30


def rival(call: Callable[[], float], name: str) -> float | None:
    try:
        return round(call(), 4)
    except (RuntimeError, ValueError, AssertionError, ImportError) as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
        return None


def flash_attention(shape: Shape, dtype: torch.dtype) -> float:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    b, d = shape.batch, shape.head_size
    table, blocks = table_of(shape, RIVAL_BLOCK)
    lengths = lengths_of(replace(shape, page=16, preset=DEFAULT_PRESET))
    starts = torch.arange(b + 1, device="cuda", dtype=torch.int32)
    size = (blocks, RIVAL_BLOCK, shape.kv_heads, d)
    if 2 * blocks * RIVAL_BLOCK * shape.kv_heads * d * 2 + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
        raise RuntimeError("does not fit in memory")
    q = torch.randn(b, shape.heads, d, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2))
    q = q.to(dtype)
    one = torch.ones(b, shape.kv_heads, device="cuda")
    scales = {} if dtype == torch.bfloat16 else {"q_descale": one, "k_descale": one, "v_descale": one}
    metadata = get_scheduler_metadata(
        batch_size=b,
        max_seqlen_q=1,
        max_seqlen_k=shape.length,
        num_heads_q=shape.heads,
        num_heads_kv=shape.kv_heads,
        headdim=d,
        cache_seqlens=lengths,
        qkv_dtype=dtype,
        cu_seqlens_q=starts,
        page_size=RIVAL_BLOCK,
        causal=True,
        window_size=(-1, -1),
        num_splits=0,
    )
    return milliseconds(
        lambda: flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=shape.length,
            softmax_scale=d**-0.5,
            causal=True,
            block_table=table,
            fa_version=3,
            scheduler_metadata=metadata,
            **scales,
        )
    )


def builtin(shape: Shape) -> float:
    """vLLM's turboquant_4bit_nc: its decode kernel with an identity in place of the rotation."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    d = shape.head_size
    c = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", d)
    table, blocks = table_of(shape, RIVAL_BLOCK)
    lengths = lengths_of(replace(shape, page=16, preset=DEFAULT_PRESET))
    q = torch.randn(shape.batch, shape.heads, d, device="cuda", dtype=torch.bfloat16)
    pages = torch.empty(blocks, RIVAL_BLOCK, shape.kv_heads, c.slot_size_aligned, device="cuda", dtype=torch.uint8).random_(
        0, 255
    )
    pages[..., c.key_packed_size - 2 : c.key_packed_size] = torch.tensor([0, 0x3C], dtype=torch.uint8, device="cuda")
    pages[..., -4:] = torch.tensor([0, 0x2C, 0, 0x3C], dtype=torch.uint8, device="cuda")
    turn = torch.eye(d, device="cuda")
    centroids = get_centroids(d, c.centroid_bits).to("cuda").float()
    return milliseconds(
        lambda: triton_turboquant_decode_attention(
            q,
            pages,
            table,
            lengths,
            turn,
            centroids,
            d**-0.5,
            c.key_mse_bits,
            c.key_packed_size,
            c.effective_value_quant_bits,
            key_fp8=c.key_fp8,
            norm_correction=c.norm_correction,
            PiT=turn,
        )
    )


@cache
def rivals(shape: Shape) -> dict[str, float | None]:
    """Times of the rivals, which know neither our presets nor our pages."""
    times = {
        "fa3_bf16_ms": rival(lambda: flash_attention(shape, torch.bfloat16), "FA3 bf16"),
        "fa3_fp8_ms": rival(lambda: flash_attention(shape, torch.float8_e4m3fn), "FA3 fp8"),
        "builtin_ms": rival(lambda: builtin(shape), "turboquant_4bit_nc"),
    }
    torch.cuda.empty_cache()
    return times
