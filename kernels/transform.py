"""Row transforms ``y = x M`` on the GPU, and the matrices that attention over stored vectors needs.

Keys and values are stored rotated, ``y = R x``, keys of calibrated layers under a `KeyBasis`. Queries are transformed once a
step, outputs rotated back once; the sketch of Algorithm 2 needs a second image of the query.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

from .basis import KeyBasis
from .format import PageFormat
from .rotation import ROTATION_SEED, rotation, sketch_matrix
from .tables import next_power_of_2

_TILE = 64


@cache
def rotation_matrix(fmt: PageFormat, device: torch.device) -> torch.Tensor:
    """R, fp32 ``[1, d, d]``; the identity for the lossless debug codec."""
    lossless = fmt.preset.key.bits == 32
    matrix = torch.eye(fmt.head_size, dtype=torch.float64) if lossless else rotation(fmt.head_size, ROTATION_SEED)
    return matrix[None].to(device=device, dtype=torch.float32).contiguous()


@cache
def key_matrix(fmt: PageFormat, device: torch.device, basis: KeyBasis | None) -> torch.Tensor:
    """E, fp32 ``[1 or Hk, d, d]``: stored rows y are keys ``y E`` (plus the mean) and meet a query as ``q E^T``."""
    if basis is None or fmt.preset.key.bits == 32:
        return rotation_matrix(fmt, device)
    return basis.inverse.mT.to(device).contiguous()


@cache
def sketch_key_matrix(fmt: PageFormat, device: torch.device, basis: KeyBasis | None) -> torch.Tensor:
    """``sqrt(pi / 2) / g * blockdiag(S, ...) E``, fp32 ``[1 or Hk, d, d]``: what `key_matrix` is for codes, for sketches."""
    s = sketch_matrix(fmt.scale_group, ROTATION_SEED) * (math.sqrt(math.pi / 2) / fmt.scale_group)
    keys = rotation(fmt.head_size, ROTATION_SEED)[None] if basis is None else basis.inverse.mT.to("cpu", torch.float64)
    return (torch.block_diag(*[s] * fmt.groups) @ keys).to(device=device, dtype=torch.float32).contiguous()


@triton.jit(do_not_specialize=["rows", "group"])
def _transform_kernel(
    x,
    out,
    matrix,  # fp32, one for each group of heads, element (in, out) at in * stride_in + out * stride_out
    rows,
    group,
    stride_token,
    stride_head,
    out_stride_token,
    out_stride_head,
    stride_in,
    stride_out,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    live = row < rows
    token, head = (row // group).to(tl.int64), tl.program_id(2) * group + row % group
    matrix += tl.program_id(2) * D * D
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, DP, BK):
        i = k + tl.arange(0, BK)
        source = x + token[:, None] * stride_token + head[:, None] * stride_head + i[None, :]
        a = tl.load(source, mask=live[:, None] & (i < D)[None, :], other=0.0).to(tl.float32)
        m = matrix + i[:, None] * stride_in + column[None, :] * stride_out
        b = tl.load(m, mask=(i < D)[:, None] & (column < D)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    target = out + token[:, None] * out_stride_token + head[:, None] * out_stride_head + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=live[:, None] & (column < D)[None, :])


def transform_rows(x: torch.Tensor, out: torch.Tensor, matrices: torch.Tensor, transpose: bool) -> None:
    """``out = x M^T`` (``transpose``) or ``x M`` with each head's M, in fp32.

    x, out: floating ``[T, H, d]``, last dim contiguous. matrices: fp32 ``[n, d, d]`` contiguous; each serves H / n heads that lie
    side by side. Writes all of ``out``.
    """
    tokens, heads, d = x.shape
    count = matrices.shape[0]
    assert x.stride(2) == 1 and out.stride(2) == 1 and out.shape == x.shape
    assert matrices.is_contiguous() and matrices.shape == (count, d, d) and heads % count == 0
    tile = min(_TILE, next_power_of_2(d))
    group = heads // count
    rows = tokens * group
    _transform_kernel[(triton.cdiv(rows, 16), triton.cdiv(d, tile), count)](
        x,
        out,
        matrices,
        rows,
        group,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        *((1, d) if transpose else (d, 1)),
        D=d,
        DP=triton.cdiv(d, tile) * tile,
        BM=16,
        BN=tile,
        BK=tile,
    )
