"""Store: rotate, search the scale, quantise and pack new tokens into their pages; K and V in one launch.

The arithmetic of ``codec.encode`` in fp32. Codes equal the reference's except where two choices are closer than fp32
rounding; scales to one ulp of fp16.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .basis import KeyBasis
from .codebook import LEVELS, LEVELS_PER_SIGMA, SCALE_CANDIDATES
from .encode import store_side
from .format import PageFormat
from .rotation import ROTATION_SEED, sketch_matrix
from .tables import check_pages, next_power_of_2, page_arguments
from .transform import rotation_matrix
from .vectors import bucket_of, token_units

_TOKENS = 16
# Up to so many tokens, programs are too few to hide each other's latency, so each gets more warps.
FEW_TOKENS = 256
_FEW_WARPS, _MANY_WARPS = 8, 4
# bf16 and fp32 inputs are brought down by an exact power of two, so that sums of the largest finite values stay finite.
_PRESCALE = 2.0**-40


@triton.jit(do_not_specialize=["tokens", "bucket", "buckets"])
def _store_kernel(
    key,
    value,
    slot_mapping,
    cache,
    key_matrix,
    key_mean,
    key_offset,
    key_normal,
    key_middle,
    positions,
    value_matrix,
    sketch,
    key_table,
    key_scalars,
    key_norms,
    value_table,
    value_scalars,
    tokens,
    bucket,
    buckets,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    cache_stride_block,
    cache_stride_head,
    KEY_BITS: tl.constexpr,
    KEY_SKETCH: tl.constexpr,
    KEY_LEVELS: tl.constexpr,
    KEY_PER_SIGMA: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr,
    VALUE_PER_SIGMA: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    BT: tl.constexpr,
    CANDIDATES: tl.constexpr,
    KEY_SIGNS: tl.constexpr,
    VALUE_SIGNS: tl.constexpr,
    BASIS: tl.constexpr,
    BUCKETS: tl.constexpr,
    PRE: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    head = tl.program_id(1) // (D // GROUP)
    group = tl.program_id(1) % (D // GROUP)
    slot = tl.load(slot_mapping + t, mask=t < tokens, other=-1).to(tl.int64)
    live = slot >= 0
    slot = tl.where(live, slot, 0)
    unit, token = token_units(
        cache, slot // BLOCK_SIZE, slot, head, cache_stride_block, cache_stride_head, BLOCK_SIZE, UNIT_BYTES
    )
    t = t.to(tl.int64)
    if tl.program_id(2) == 0:
        x = key + t * key_stride_token + head * key_stride_head
        if BASIS:
            key_matrix += head * D * D
            key_mean += head * buckets * D
            key_offset += head * D
            key_normal += head * D
            key_middle += head * D
        place = tl.zeros([1], tl.int32)
        if BUCKETS:
            place = bucket_of(tl.load(positions + t, mask=live, other=0), bucket, buckets)
        store_side(
            x, unit, token, live, key_matrix, key_mean, key_offset, key_normal, key_middle, place, sketch,
            key_table, key_scalars, key_norms, group,
            KEY_BITS, KEY_SKETCH, KEY_LEVELS, KEY_PER_SIGMA, K0, K1, K2, D, GROUP, GP, CANDIDATES, KEY_SIGNS, BASIS, PRE,
        )  # fmt: skip
    else:
        x = value + t * value_stride_token + head * value_stride_head
        store_side(
            x, unit, token, live, value_matrix, key_mean, key_offset, key_normal, key_middle, 0, sketch,
            value_table, value_scalars, value_scalars, group,
            VALUE_BITS, False, VALUE_LEVELS, VALUE_PER_SIGMA, V0, V1, V2, D, GROUP, GP, CANDIDATES, VALUE_SIGNS, False, PRE,
        )  # fmt: skip


@cache
def _constants(fmt: PageFormat, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Rotation (as +-1 where that is exact), Algorithm 2's S; and whether the rotation is +-1."""
    # Triton's interpreter multiplies bf16 operands wrongly; there the fp32 product serves.
    exact = (torch.float16,) if isinstance(_store_kernel, InterpretedFunction) else (torch.bfloat16, torch.float16)
    signs = fmt.head_size & (fmt.head_size - 1) == 0 and dtype in exact
    matrix = rotation_matrix(fmt, device)
    if signs:
        matrix = matrix.sign().to(dtype)
    s = sketch_matrix(fmt.scale_group, ROTATION_SEED) if fmt.preset.key.sketch else torch.zeros(1, 1)
    return matrix.contiguous(), s.to(device=device, dtype=torch.float32).contiguous(), signs


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: PageFormat,
    basis: KeyBasis | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """Encodes tokens into their slots; writes exactly the bytes that those tokens own and reads no page.

    key, value: ``[T', H, d]`` of one floating dtype, T' >= T, last dim contiguous. cache: uint8 ``[B, H, N, C]`` with ``[N,
    C]`` contiguous per (block, head). slot_mapping: int64 ``[T]``; negative slots are skipped. basis: of the keys, on the
    same device; the plain rotation without. positions: int64 ``[T]`` or longer, contiguous, of the tokens in their sequences;
    ValueError where a basis of several buckets comes without.
    """
    heads = key.shape[1]
    assert key.dtype == value.dtype and key.stride(2) == 1 and value.stride(2) == 1
    check_pages(cache, fmt, heads)
    tokens = slot_mapping.shape[0]
    if tokens == 0:
        return
    matrix, sketch, signs = _constants(fmt, cache.device, key.dtype)
    if fmt.preset.key.bits == 32:
        basis = None
    buckets = 1 if basis is None else basis.buckets
    if buckets > 1 and (positions is None or positions.shape[0] < tokens):
        raise ValueError(f"a key basis of {buckets} buckets needs the positions of all {tokens} tokens")
    assert positions is None or (positions.dtype == torch.int64 and positions.is_contiguous())
    _store_kernel[(triton.cdiv(tokens, _TOKENS), heads * fmt.groups, 2)](
        key,
        value,
        slot_mapping,
        key_matrix=matrix if basis is None else basis.forward,
        key_mean=None if basis is None else basis.means,
        key_offset=None if basis is None else basis.offset,
        key_normal=None if basis is None else basis.normal,
        key_middle=None if basis is None else basis.middle,
        positions=positions if buckets > 1 else None,
        value_matrix=matrix,
        sketch=sketch,
        tokens=tokens,
        bucket=1 if basis is None else basis.bucket,
        buckets=buckets,
        key_stride_token=key.stride(0),
        key_stride_head=key.stride(1),
        value_stride_token=value.stride(0),
        value_stride_head=value.stride(1),
        KEY_LEVELS=LEVELS.get(fmt.preset.key.bits, (0.0,)),
        KEY_PER_SIGMA=LEVELS_PER_SIGMA.get(fmt.preset.key.bits, 1.0),
        VALUE_LEVELS=LEVELS.get(fmt.preset.value.bits, (0.0,)),
        VALUE_PER_SIGMA=LEVELS_PER_SIGMA.get(fmt.preset.value.bits, 1.0),
        GP=next_power_of_2(fmt.scale_group),
        BT=_TOKENS,
        CANDIDATES=SCALE_CANDIDATES,
        KEY_SIGNS=signs and basis is None,
        VALUE_SIGNS=signs,
        BASIS=basis is not None,
        BUCKETS=buckets > 1,
        PRE=1.0 if key.dtype == torch.float16 else _PRESCALE,
        num_warps=_FEW_WARPS if tokens <= FEW_TOKENS else _MANY_WARPS,
        **page_arguments(cache, fmt),
    )
