"""Launcher of what turns queries under a key basis, for the CUDA decode of the same call."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch

from ..basis import KeyBasis
from ..format import PageFormat
from .driver import Function, built, device_facts
from .fragments import query_fragments
from .programs import TurnVariant
from .variant import padded_buckets, record_bytes


class _Params(ctypes.Structure):
    """``struct Params`` of turn.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "turned", "basis")),
        *((name, ctypes.c_uint64) for name in ("query_token", "query_head")),
        *((name, ctypes.c_int) for name in ("rows", "kv_heads", "group")),
        ("score_scale", ctypes.c_float),
    )


@cache
def _function(index: int, variant: TurnVariant) -> Function:
    return Function(variant, index)


def _variant(fmt: PageFormat, dtype: torch.dtype, basis: KeyBasis, few: bool) -> TurnVariant:
    return TurnVariant(fmt, dtype == torch.bfloat16, padded_buckets(basis.buckets), few)


def prepare(index: int, fmt: PageFormat, dtype: torch.dtype, basis: KeyBasis) -> bool:
    """Compiles and loads what `turn` needs on CUDA device ``index``; puts matrices in order. Whether it can be used here."""
    query_fragments(basis)
    variants = [_variant(fmt, dtype, basis, few) for few in (True, False)]
    return built("decode", lambda: [_function(index, variant) for variant in variants])


def _arguments(
    query: torch.Tensor, turned: torch.Tensor, fmt: PageFormat, scale: float, basis: KeyBasis, multiprocessors: int
) -> tuple[TurnVariant, _Params, int]:
    """The kernel, its parameters and its CTAs."""
    tokens, heads, d = query.shape
    kv_heads = basis.sink_mean.shape[0]
    rows = tokens * (heads // kv_heads)
    grid = kv_heads * -(-rows // TurnVariant.columns)
    variant, fragments = _variant(fmt, query.dtype, basis, grid <= multiprocessors), query_fragments(basis)
    assert fragments.device == query.device and query.stride(2) == 1
    assert turned.dtype == torch.float32 and turned.is_contiguous() and turned.data_ptr() % 16 == 0
    assert 4 * turned.numel() >= tokens * heads * record_bytes(d, variant.buckets)
    pointers = query.data_ptr(), turned.data_ptr(), fragments.data_ptr()
    params = _Params(*pointers, query.stride(0), query.stride(1), rows, kv_heads, heads // kv_heads, scale * math.log2(math.e))
    return variant, params, grid


def turn(query: torch.Tensor, turned: torch.Tensor, fmt: PageFormat, scale: float, basis: KeyBasis, stream: int) -> None:
    """Turns queries ``[T, Hq, d]``, bf16 or fp16, on ``stream``.

    turned: fp32 scratch, 16-byte aligned, at least ``T * Hq * record_bytes(d, buckets)`` bytes; what is written is turn.cu's. The
    next kernel of the stream may be launched with ``overlap``. Raises CudaError where `prepare` is False.
    """
    index = query.device.index
    variant, params, grid = _arguments(query, turned, fmt, scale, basis, device_facts(index).multiprocessors)
    if grid:
        _function(index, variant).launch(grid, params, stream)
