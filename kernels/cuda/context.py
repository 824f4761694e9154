"""Launcher of the CUDA context loader: the contract of ``kernels.prefill.load_context`` for the formats of `supported_pages`."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ..basis import KeyBasis
from ..format import UNIT_TOKENS, PageFormat
from ..tables import check_context
from .driver import Function, built, device_index
from .fragments import bucket_arguments, key_fragments
from .programs import ContextVariant
from .variant import supported_pages


class _Params(ctypes.Structure):
    """``struct Params`` of context.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "cache", "block_table", "first", "start_loc")),
        *((name, ctypes.c_uint64) for name in ("out_token", "out_head", "cache_block", "cache_head", "table_request")),
        *((name, ctypes.c_int) for name in ("kv_heads", "tiles")),
        ("basis", ctypes.c_void_p),
        ("basis_head", ctypes.c_uint64),
        ("bucket", ctypes.c_uint32),
        ("buckets", ctypes.c_int),
    )


@cache
def _function(index: int, variant: ContextVariant) -> Function:
    return Function(variant, index)


def prepare(device: torch.device, fmt: PageFormat, block_size: int, dtype: torch.dtype, basis: KeyBasis | None = None) -> bool:
    """Compiles and loads what `load_context` needs. Whether it can be used here.

    dtype: of the workspaces, bf16 or fp16. basis: of the layer's keys, on ``device``; its matrices are put in order here. Call
    at warm-up, on every device and before capturing graphs. Where a supported kernel cannot be built, one warning is logged.
    """
    if not supported_pages(fmt, block_size) or dtype not in (torch.bfloat16, torch.float16) or device.type != "cuda":
        return False
    variant = ContextVariant(fmt, block_size, dtype == torch.bfloat16, basis is not None)
    if not built("context loader", lambda: _function(device_index(device), variant)):
        return False
    if basis is not None:
        key_fragments(basis, variant.matrix_parts)
    return True


def _arguments(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    first: torch.Tensor,
    start_loc: torch.Tensor,
    longest: int,
    key: torch.Tensor,
    value: torch.Tensor,
    fmt: PageFormat,
    basis: KeyBasis | None,
) -> tuple[ContextVariant, _Params, int]:
    """The kernel, its parameters and its CTAs, 0 where there is nothing to do."""
    heads = key.shape[1]
    check_context(cache, block_table, first, start_loc, key, value, fmt)
    assert supported_pages(fmt, cache.shape[2])
    assert key.dtype == value.dtype and key.dtype in (torch.bfloat16, torch.float16)
    assert key.stride(0) % 8 == 0 and key.stride(1) % 8 == 0, "rows are written 16 bytes at a time"
    assert key.data_ptr() % 16 == 0 and value.data_ptr() % 16 == 0, "rows are written 16 bytes at a time"
    assert block_table.dtype == first.dtype == start_loc.dtype == torch.int32
    requests = first.shape[0]
    variant = ContextVariant(fmt, cache.shape[2], key.dtype == torch.bfloat16, basis is not None)
    fragments = None
    if basis is not None:
        fragments = key_fragments(basis, variant.matrix_parts)
        assert basis.sink_mean.shape == key.shape[1:] and fragments.device == cache.device
    # A range may begin with the last token of a unit.
    units = (longest + 2 * UNIT_TOKENS - 2) // UNIT_TOKENS if longest > 0 else 0
    tiles = -(-units // (variant.warps // 2))
    params = _Params(
        key.data_ptr(),
        value.data_ptr(),
        cache.data_ptr(),
        block_table.data_ptr(),
        first.data_ptr(),
        start_loc.data_ptr(),
        key.stride(0),
        key.stride(1),
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        heads,
        tiles,
        0 if fragments is None else fragments.data_ptr(),
        0 if fragments is None else fragments.stride(0),
        *bucket_arguments(basis),
    )
    return variant, params, tiles * heads * requests


def load_context(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    first: torch.Tensor,
    start_loc: torch.Tensor,
    longest: int,
    key: torch.Tensor,
    value: torch.Tensor,
    fmt: PageFormat,
    basis: KeyBasis | None = None,
) -> None:
    """Decodes one range of tokens a request: ``first[r], first[r] + 1, ...`` into rows ``start_loc[r] .. start_loc[r + 1] - 1``.

    cache: uint8 ``[B, H, N, C]``. block_table: int32 ``[R, *]``, last dim contiguous; entries outside a range are never read.
    first: int32 ``[R]``. start_loc: int32 ``[R + 1]``. Both are read on the device, where lengths are exact; ``longest`` is the
    host's bound of a range. key, value: bf16 or fp16, both alike, ``[rows, H, d]`` of equal strides, 16-byte aligned heads, last
    dim contiguous; written in the model's basis. basis: under which the keys were stored, on the cache's device. Raises CudaError
    where `prepare` with the same options is False.
    """
    variant, params, grid = _arguments(cache, block_table, first, start_loc, longest, key, value, fmt, basis)
    if grid:
        index = cache.device.index
        _function(index, variant).launch(grid, params, torch.cuda.current_stream(index).cuda_stream)
