"""Launcher of the CUDA decode: the contract of ``kernels.decode`` for the formats and shapes of `supported`.

`prepare` compiles at warm-up and says whether this machine can; `decode` then launches one kernel a call, under a key basis after
one that turns queries, on torch's current stream, with a grid that depends on the device alone. Launches on one device share
counters and must be ordered.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch

from ..basis import MAX_BUCKETS, KeyBasis
from ..format import PageFormat
from ..tables import check_pages
from . import turn
from .driver import Device, Kernel, built, device_facts, device_index
from .fragments import bucket_arguments
from .nvrtc import CudaError
from .variant import Options, Tuning, Variant, padded_buckets, padded_rows, record_bytes, supported

_BULK_ARCH = 90
_RESERVED_SHARED = 1024  # bytes of each block that are the system's
_MAX_GRID = 4096
# (warps, stages, CTAs a multiprocessor), best first; the first that fits a device's shared memory is used. The second list
# is for kernels that need more than 128 registers a thread.
_TUNINGS = ((8, 2, 2), (4, 2, 3), (4, 2, 2), (4, 2, 1), (2, 2, 2), (2, 2, 1), (2, 1, 1))
_TUNINGS_WIDE = tuple(t for t in _TUNINGS if t[0] * t[2] <= 8)


class _Params(ctypes.Structure):
    """``struct Params`` of params.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "cache", "block_table", "seq_lens", "query_start_loc")),
        *((name, ctypes.c_void_p) for name in ("sinks", "partial", "counters")),
        *((name, ctypes.c_uint64) for name in ("query_token", "query_head", "out_token", "out_head")),
        *((name, ctypes.c_uint64) for name in ("cache_block", "cache_head", "table_request")),
        *((name, ctypes.c_int) for name in ("requests", "kv_heads", "group", "max_query_len", "window")),
        *((name, ctypes.c_float) for name in ("score_scale", "out_scale", "soft_cap")),
        ("turned", ctypes.c_void_p),
        ("bucket", ctypes.c_uint32),
        ("buckets", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("ends", "lse")),
    )


def choose_variant(facts: Device, options: Options) -> Variant:
    """The kernel for these options on a device like ``facts``. Raises CudaError where none fits."""
    wide = options.fmt.head_size == 256 or options.rows > 8
    for warps, stages, ctas in _TUNINGS_WIDE if wide else _TUNINGS:
        variant = Variant(options, Tuning(warps, stages, ctas, facts.arch >= _BULK_ARCH))
        fits = ctas * (variant.shared_bytes + _RESERVED_SHARED) <= facts.shared_per_multiprocessor
        if fits and variant.shared_bytes <= facts.shared_per_block:
            return variant
    raise CudaError(f"{facts.shared_per_block} bytes of shared memory are too few")


@cache
def _kernel(index: int, options: Options) -> Kernel:
    return Kernel(choose_variant(device_facts(index), options), index)


@cache
def _counters(index: int) -> torch.Tensor:
    """int32 zeros, one a CTA; each launch leaves them zero."""
    return torch.zeros(_MAX_GRID, dtype=torch.int32, device=f"cuda:{index}")


def scratch_floats(group: int, head_size: int, max_query_len: int, device: torch.device, rows: int = 0) -> int:
    """fp32 scratch elements that any `decode` of this shape needs on ``device``; no length matters.

    rows: query tokens times query heads, of layers whose keys are under a basis. Raises CudaError where ``device`` is not a CUDA
    device.
    """
    return partial_floats(group, head_size, max_query_len, device) + rows * record_bytes(head_size, MAX_BUCKETS) // 4


def partial_floats(group: int, head_size: int, max_query_len: int, device: torch.device) -> int:
    """Those that partial results need; turned queries lie behind."""
    held = padded_rows(group, max_query_len)
    ctas = max(t[2] for t in (_TUNINGS_WIDE if head_size == 256 or held > 8 else _TUNINGS))
    multiprocessors = device_facts(device_index(device)).multiprocessors
    return 2 * multiprocessors * ctas * held * (head_size + 4)


def prepare(
    device: torch.device,
    fmt: PageFormat,
    block_size: int,
    dtype: torch.dtype,
    group: int,
    max_query_len: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.dtype | None = None,
    basis: KeyBasis | None = None,
    recent: bool = False,
) -> bool:
    """Compiles and loads what `decode` needs for these options. Whether the CUDA decode can be used for them here.

    dtype: of query and output, bf16 or fp16. group: query heads a KV head. sinks: dtype of the sinks, fp32 or ``dtype``.
    basis: of the layer's keys, on ``device``; its matrices are put in order here. recent: with ``ends`` and ``lse``. Call at
    warm-up, on every device and before capturing graphs. Where a supported kernel cannot be built, one warning is logged.
    """
    if not supported(fmt, block_size, group, max_query_len) or dtype not in (torch.bfloat16, torch.float16):
        return False
    if sinks not in (None, torch.float32, dtype) or device.type != "cuda":
        return False
    index = device_index(device)
    options = _options(fmt, block_size, dtype, group, max_query_len, window, soft_cap, sinks, basis, recent)
    if not built("decode", lambda: _kernel(index, options)):
        return False
    _counters(index)
    return basis is None or turn.prepare(index, fmt, dtype, basis)


def _options(
    fmt: PageFormat,
    block_size: int,
    dtype: torch.dtype,
    group: int,
    max_query_len: int,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.dtype | None,
    basis: KeyBasis | None,
    recent: bool,
) -> Options:
    sink_bits, bf16 = 0 if sinks is None else 8 * sinks.itemsize, dtype == torch.bfloat16
    buckets = 0 if basis is None else padded_buckets(basis.buckets)
    return Options(fmt, block_size, bf16, group, max_query_len, bool(window), bool(soft_cap), sink_bits, buckets, recent)


def _arguments(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    turned: torch.Tensor | None,
    counters: torch.Tensor,
    fmt: PageFormat,
    scale: float,
    max_query_len: int,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    basis: KeyBasis | None,
    ends: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> tuple[Options, _Params]:
    """The kernel's options and parameters."""
    _, heads, d = query.shape
    _, kv_heads, block_size, _ = cache.shape
    group = heads // kv_heads
    check_pages(cache, fmt, kv_heads)
    assert supported(fmt, block_size, group, max_query_len) and scale > 0 and d == fmt.head_size
    assert query.dtype == out.dtype and query.shape == out.shape and query.stride(2) == 1 and out.stride(2) == 1
    assert out.data_ptr() % 4 == 0 and out.stride(0) % 2 == 0 and out.stride(1) % 2 == 0
    assert block_table.stride(1) == 1 and seq_lens.is_contiguous() and query_start_loc.is_contiguous()
    assert block_table.dtype == seq_lens.dtype == query_start_loc.dtype == counters.dtype == torch.int32
    assert scratch.dtype == torch.float32 and scratch.data_ptr() % 16 == 0 and scratch.is_contiguous()
    assert sinks is None or (sinks.is_contiguous() and sinks.dtype in (torch.float32, query.dtype))
    assert (ends is None) == (lse is None)
    if ends is not None and lse is not None:
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.shape[0] >= seq_lens.shape[0]
        assert lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == query.shape[:2]
    rotation = 1 / math.sqrt(d)
    assert basis is None or basis.sink_mean.shape == (kv_heads, d)
    params = _Params(
        query.data_ptr(),
        out.data_ptr(),
        cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        query_start_loc.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        scratch.data_ptr(),
        counters.data_ptr(),
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        seq_lens.shape[0],
        kv_heads,
        group,
        max_query_len,
        window or 0,
        scale * (rotation if basis is None else 1.0) * math.log2(math.e),
        rotation,
        (soft_cap or 0.0) * math.log2(math.e),
        0 if turned is None else turned.data_ptr(),
        *bucket_arguments(basis),
        0 if ends is None else ends.data_ptr(),
        0 if lse is None else lse.data_ptr(),
    )
    sink = None if sinks is None else sinks.dtype
    of_request = window, soft_cap, sink, basis, ends is not None
    return _options(fmt, block_size, query.dtype, group, max_query_len, *of_request), params


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    fmt: PageFormat,
    scale: float,
    max_query_len: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    basis: KeyBasis | None = None,
    ends: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Attention of the last ``query_start_loc[r + 1] - query_start_loc[r]`` (at most ``max_query_len``) tokens of each request.

    query, out: bf16 or fp16, both alike, ``[T, Hq, d]``; rows of requests are written, those of length 0 as zeros. cache:
    uint8 ``[B, Hk, N, C]``. block_table: int32 ``[R, *]``; entries past a length or wholly before a window are never read.
    seq_lens: int32 ``[R]``, query tokens included. query_start_loc: int32 ``[R + 1]``. scratch: fp32, at least
    ``scratch_floats(...)`` elements, contents free. scale: above 0. sinks: ``[Hq]`` logits without a value. basis: under which
    the keys were stored, on the cache's device; without a mean where there are soft cap or sinks, for all logits of a query
    are shifted alike. ends, lse: as of ``kernels.decode``. Raises CudaError where `prepare` with the same options is False.
    """
    index = cache.device.index
    group, stream = query.shape[1] // cache.shape[1], torch.cuda.current_stream(index).cuda_stream
    rows = 0 if basis is None else query.shape[0] * query.shape[1]
    assert scratch.numel() >= scratch_floats(group, fmt.head_size, max_query_len, cache.device, rows)
    turned = None
    if basis is not None:
        turned = scratch[partial_floats(group, fmt.head_size, max_query_len, cache.device) :]
        turn.turn(query, turned, fmt, scale, basis, stream)
    batch = query, cache, block_table, seq_lens, query_start_loc, out, scratch, turned, _counters(index)
    options, params = _arguments(*batch, fmt, scale, max_query_len, window, soft_cap, sinks, basis, ends, lse)
    kernel = _kernel(index, options)
    kernel.launch(kernel.grid, params, stream, overlap=basis is not None)
