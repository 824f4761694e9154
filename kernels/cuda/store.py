"""Launcher of the CUDA store: the contract of ``kernels.store`` for the formats of `supported_pages` and 16-bit vectors."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ..basis import KeyBasis
from ..format import PageFormat
from ..tables import check_pages, side_tables
from .driver import Function, built, device_index
from .fragments import bucket_arguments
from .programs import StoreVariant
from .variant import supported_pages


class _Params(ctypes.Structure):
    """``struct Params`` of store.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "slots", "positions", "key_offsets", "value_offsets")),
        *((name, ctypes.c_void_p) for name in ("key_scalars", "value_scalars", "cache")),
        *((name, ctypes.c_uint64) for name in ("key_token", "key_head", "value_token", "value_head")),
        *((name, ctypes.c_uint64) for name in ("cache_block", "cache_head")),
        *((name, ctypes.c_int) for name in ("tokens", "kv_heads")),
        *((name, ctypes.c_void_p) for name in ("matrix", "means", "offset", "normal", "middle")),
        ("bucket", ctypes.c_uint32),
        ("buckets", ctypes.c_int),
    )


@cache
def _function(index: int, variant: StoreVariant) -> Function:
    return Function(variant, index)


def prepare(device: torch.device, fmt: PageFormat, block_size: int, dtype: torch.dtype, basis: KeyBasis | None = None) -> bool:
    """Compiles and loads what `store` needs. Whether it can be used here.

    dtype: of keys and values, bf16 or fp16. basis: of the layer's keys, on ``device``. Call at warm-up, on every device and
    before capturing graphs. Where a supported kernel cannot be built, one warning is logged.
    """
    if not supported_pages(fmt, block_size) or dtype not in (torch.bfloat16, torch.float16) or device.type != "cuda":
        return False
    variant = StoreVariant(fmt, block_size, dtype == torch.bfloat16, basis is not None)
    if not built("store", lambda: _function(device_index(device), variant)):
        return False
    for kind in fmt.sides:
        side_tables(fmt, kind, device)
    return True


def _arguments(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: PageFormat,
    basis: KeyBasis | None,
    positions: torch.Tensor | None,
) -> tuple[StoreVariant, _Params, int]:
    """The kernel, its parameters and its CTAs, 0 where there is nothing to do."""
    _, heads, d = key.shape
    check_pages(cache, fmt, heads)
    assert supported_pages(fmt, cache.shape[2]) and d == fmt.head_size
    assert key.dtype == value.dtype and key.dtype in (torch.bfloat16, torch.float16) and key.shape == value.shape
    for side in (key, value):
        assert side.stride(2) == 1 and side.stride(0) % 8 == side.stride(1) % 8 == side.data_ptr() % 16 == 0, side.stride()
    tokens = slot_mapping.shape[0]
    assert slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous() and key.shape[0] >= tokens
    assert positions is None or (positions.dtype == torch.int64 and positions.is_contiguous())
    buckets = 1 if basis is None else basis.buckets
    if buckets > 1 and (positions is None or positions.shape[0] < tokens):
        raise ValueError(f"a key basis of {buckets} buckets needs the positions of all {tokens} tokens")
    variant = StoreVariant(fmt, cache.shape[2], key.dtype == torch.bfloat16, basis is not None)
    keys, values = (side_tables(fmt, kind, cache.device) for kind in ("key", "value"))
    parts: tuple[int, ...] = (0,) * 5
    if basis is not None:
        assert basis.sink_mean.shape == (heads, d) and basis.means.device == cache.device
        parts = tuple(x.data_ptr() for x in (basis.forward, basis.means, basis.offset, basis.normal, basis.middle))
    params = _Params(
        key.data_ptr(),
        value.data_ptr(),
        slot_mapping.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        keys.table.data_ptr(),
        values.table.data_ptr(),
        keys.scalars.data_ptr(),
        values.scalars.data_ptr(),
        cache.data_ptr(),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cache.stride(0),
        cache.stride(1),
        tokens,
        heads,
        *parts,
        *bucket_arguments(basis),
    )
    return variant, params, 2 * heads * -(-tokens // variant.warps)


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

    key, value: bf16 or fp16, both alike, ``[T', H, d]``, T' >= T, heads 16-byte aligned, last dim contiguous. cache: uint8 ``[B,
    H, N, C]``. slot_mapping: int64 ``[T]``; negative slots are skipped. basis, positions: as of ``kernels.store``. Raises
    CudaError where `prepare` with the same options is False.
    """
    variant, params, grid = _arguments(key, value, cache, slot_mapping, fmt, basis, positions)
    if grid:
        index = cache.device.index
        _function(index, variant).launch(grid, params, torch.cuda.current_stream(index).cuda_stream)
