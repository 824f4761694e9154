"""The copy of new tokens into the frames of `recent_claim`, beside what the store writes into their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .recent_claim import check_pools
from .tables import next_power_of_2

_ELEMENTS = 2048  # that a program copies at most


@triton.jit(do_not_specialize=["tokens", "kv_heads"])
def _keep_kernel(
    key,
    value,
    slot_mapping,
    recent_key,
    recent_value,
    frame_of,
    mean,
    tokens,
    kv_heads,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    MEAN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping + t, mask=t < tokens, other=-1).to(tl.int64)
    frame = tl.load(frame_of + slot // 16, mask=slot >= 0, other=-1).to(tl.int64)
    d = tl.arange(0, DP)
    live = (frame >= 0)[:, None] & (d < D)[None, :]
    target = ((frame * 16 + slot % 16) * kv_heads + head)[:, None] * D + d[None, :]
    t = t.to(tl.int64)[:, None]
    if tl.program_id(2) == 0:
        x = tl.load(key + t * key_stride_token + head.to(tl.int64) * key_stride_head + d[None, :], mask=live, other=0.0)
        if MEAN:
            x = (x.to(tl.float32) - tl.load(mean + head * D + d, mask=d < D, other=0.0)[None, :]).to(x.dtype)
        tl.store(recent_key + target, x, mask=live)
    else:
        x = tl.load(value + t * value_stride_token + head.to(tl.int64) * value_stride_head + d[None, :], mask=live, other=0.0)
        tl.store(recent_value + target, x, mask=live)


def keep(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    recent_key: torch.Tensor,
    recent_value: torch.Tensor,
    frame_of: torch.Tensor,
    mean: torch.Tensor | None = None,
) -> None:
    """Copies new tokens whose unit has a frame into it; writes nothing else.

    key, value: floating ``[T', Hk, d]``, T' >= T, last dim contiguous. slot_mapping: int64 ``[T]``; negative slots are skipped.
    recent_key, recent_value: ``[F, 16, Hk, d]`` of the same dtype, contiguous. frame_of: of `RecentUnits`, claimed for this step.
    mean: fp32 ``[Hk, d]`` contiguous, subtracted from keys: that to which the scores of the compressed tokens are relative.
    """
    tokens, (heads, d) = slot_mapping.shape[0], key.shape[1:]
    assert key.stride(2) == 1 and value.stride(2) == 1 and value.shape[1:] == key.shape[1:]
    check_pools(recent_key, recent_value, heads, d)
    assert key.dtype == value.dtype == recent_key.dtype and key.shape[0] >= tokens and value.shape[0] >= tokens
    assert mean is None or (mean.is_contiguous() and mean.shape == (heads, d) and mean.dtype == torch.float32)
    if tokens == 0:
        return
    dp = next_power_of_2(d)
    bt = min(16, _ELEMENTS // dp)
    _keep_kernel[(triton.cdiv(tokens, bt), heads, 2)](
        key,
        value,
        slot_mapping,
        recent_key,
        recent_value,
        frame_of,
        mean,
        tokens,
        heads,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        MEAN=mean is not None,
        D=d,
        DP=dp,
        BT=bt,
        num_warps=4,
    )
