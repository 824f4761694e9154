"""vLLM 0.33's own kernels on random vectors, under Triton's interpreter; run by `test_codecs` in a process of its own.

python rivals_033.py IN OUT     IN: a dict of key and value, float32 [T, H, d]; OUT: what each dtype gives back of them
"""

import sys
import types

import torch
import triton
import triton.language as tl

# vLLM hides Triton where there is no GPU driver.
stub = types.ModuleType("vllm.triton_utils")
stub.triton, stub.tl, stub.HAS_TRITON = triton, tl, True  # type: ignore[attr-defined]
sys.modules["vllm.triton_utils"] = stub

from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids  # noqa: E402
from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig  # noqa: E402
from vllm.v1.attention.ops import int4_per_token_head as int4  # noqa: E402
from vllm.v1.attention.ops.triton_turboquant_decode import _tq_decode_stage1, _tq_full_dequant_kv  # noqa: E402
from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store  # noqa: E402

BLOCK = 16


def stored(name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, TurboQuantConfig, torch.Tensor]:
    """Cache, configuration and centroids after vLLM's own store."""
    tokens, heads, d = key.shape
    config = TurboQuantConfig.from_cache_dtype(name, d)
    centroids = get_centroids(d, config.centroid_bits)
    cache = torch.zeros(-(-tokens // BLOCK), BLOCK, heads, config.slot_size_aligned, dtype=torch.uint8)
    turn = torch.ones(1, 1)
    while len(turn) < d:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    triton_turboquant_store(
        key,
        value,
        cache,
        torch.arange(tokens, dtype=torch.int32),
        turn / d**0.5,
        (centroids[1:] + centroids[:-1]) / 2,
        mse_bits=config.key_mse_bits,
        key_packed_size=config.key_packed_size,
        value_quant_bits=config.effective_value_quant_bits,
        key_fp8=config.key_fp8,
    )
    return cache, config, centroids


def turboquant(name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys as they are stored (still rotated) and values: through vLLM's own dequantisation, which rounds to fp16."""
    tokens, heads, d = key.shape
    cache, config, centroids = stored(name, key, value)
    sides = [torch.zeros(1, heads, tokens, d, dtype=torch.float32) for _ in range(2)]
    _tq_full_dequant_kv[(tokens, heads)](
        cache,
        torch.arange(len(cache), dtype=torch.int32)[None],
        centroids,
        *sides,
        *sides[0].stride()[:3],
        *sides[1].stride()[:3],
        *cache.stride()[:3],
        len(cache),
        HEAD_DIM=d,
        BLOCK_SIZE=BLOCK,
        NUM_KV_HEADS=heads,
        MSE_BYTES=0 if config.key_fp8 else config.key_packed_size - 2,
        KPS=config.key_packed_size,
        VQB=config.effective_value_quant_bits,
        VAL_DATA_BYTES=config.value_packed_size - 4,
        MSE_BITS=max(config.key_mse_bits, 3),
        KEY_FP8=int(config.key_fp8),
        BLOCK_D=d,
        NORM_CORRECTION=int(config.norm_correction),
    )
    return sides[0][0].transpose(0, 1), sides[1][0].transpose(0, 1)


def scores(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Output of vLLM's decode kernel for one query ``[H, d]`` over all keys, one split: ``[H, d]``."""
    tokens, heads, d = key.shape
    cache, config, centroids = stored(name, key, value)
    turn = torch.ones(1, 1)
    while len(turn) < d:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    q = query if config.key_fp8 else query @ (turn / d**0.5)
    out = torch.zeros(1, heads, 1, d + 1)
    table = torch.arange(len(cache), dtype=torch.int32)[None]
    _tq_decode_stage1[(1, heads, 1)](
        q[None].contiguous(),
        cache,
        table,
        torch.tensor([tokens], dtype=torch.int32),
        centroids,
        out,
        heads * d,
        d,
        *cache.stride()[:3],
        len(cache),
        *out.stride()[:3],
        NUM_KV_HEADS=heads,
        HEAD_DIM=d,
        BLOCK_SIZE=BLOCK,
        NUM_KV_SPLITS=1,
        KV_GROUP_SIZE=1,
        MSE_BITS=max(config.key_mse_bits, 3),
        MSE_BYTES=0 if config.key_fp8 else config.key_packed_size - 2,
        KPS=config.key_packed_size,
        VQB=config.effective_value_quant_bits,
        VAL_DATA_BYTES=config.value_packed_size - 4,
        ATTN_SCALE=d**-0.5,
        BLOCK_D=d,
        BLOCK_KV=4,
        KEY_FP8=int(config.key_fp8),
        NORM_CORRECTION=int(config.norm_correction),
    )
    return out[0, :, 0, :d]


def int4_stored(key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """Codes uint8 ``[T, H, d]`` and step with its hidden zero point, float32 ``[T, H]``, of keys, then of values."""
    tokens, heads, d = key.shape
    blocks = -(-tokens // BLOCK)
    caches = [torch.zeros(blocks, BLOCK, heads, d // 2, dtype=torch.uint8) for _ in range(2)]
    steps = [torch.zeros(blocks, BLOCK, heads) for _ in range(2)]
    slots = torch.arange(tokens)
    int4.reshape_and_cache_int4(key, value, *caches, slots, k_scale_cache=steps[0], v_scale_cache=steps[1])
    results = []
    for cache, step in zip(caches, steps, strict=True):
        packed = cache.flatten(0, 1)[:tokens]
        results += [torch.stack([packed & 15, packed >> 4], -1).flatten(-2), step.flatten(0, 1)[:tokens]]
    return results


if __name__ == "__main__":
    given = torch.load(sys.argv[1])
    vectors = given["key"], given["value"]
    found = {name: turboquant(name, *vectors) for name in TQ_PRESETS}
    found |= {f"{name} attention": scores(name, given["query"], *vectors) for name in TQ_PRESETS}
    d = vectors[0].shape[-1]
    found["centroids"] = {bits: get_centroids(d, bits) for bits in (3, 4)}
    found["int4"] = int4_stored(*vectors)
    found["int4 signs"] = int4._get_rht_signs(d, 0, torch.device("cpu"))
    torch.save(found, sys.argv[2])
