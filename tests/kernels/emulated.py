"""The CUDA kernels on the CPU: their own sources, compiled by the C++ compiler over an emulated warp."""

import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from vllm_turboquant.kernels.cuda import context
from vllm_turboquant.kernels.cuda.launch import _Params
from vllm_turboquant.kernels.cuda.variant import Tuning, Variant, padded_rows, source

COMPILER = shutil.which("c++") or shutil.which("g++")
HERE = Path(__file__).parent
SMALL = Tuning(2, 2, 2, True)


@functools.cache
def folder():
    return tempfile.mkdtemp(prefix="turboquant-emulated-")


@functools.cache
def compiled(variant):
    """The variant's ``run(params, blocks)``."""
    parts = [(HERE / "emulator.h").read_text(), *(source(name) for name in variant.sources if name != "ptx")]
    text = "\n".join([*parts, (HERE / "emulator.cc").read_text()])
    macros = {"SHARED_BYTES": "1"} | variant.macros() | {"ENTRY": variant.entry}
    options = [f"-D{name}={value}" for name, value in macros.items()]
    name = hashlib.sha256(repr((text, options)).encode()).hexdigest()[:16]
    file, library = Path(folder(), f"{name}.cc"), Path(folder(), f"{name}.so")
    file.write_text(text)
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *options, str(file), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).run


def decode(
    batch, query, scale, max_query_len, *, grid=5, tuning=SMALL, window=None, soft_cap=None, sinks=None
):  # fmt: skip
    """What `launch.decode` computes, on CPU tensors with ``grid`` CTAs. Returns the output; checks counters and surroundings."""
    tokens, heads, d = query.shape
    kv_heads, block_size = batch.cache.shape[1:3]
    group = heads // kv_heads
    variant = Variant(
        batch.fmt,
        block_size,
        query.dtype == torch.bfloat16,
        padded_rows(group, max_query_len),
        max_query_len > 1,
        bool(window),
        bool(soft_cap),
        0 if sinks is None else 8 * sinks.dtype.itemsize,
        tuning,
    )
    out = torch.full((tokens + 2, heads, d), 7.0, dtype=query.dtype)
    partial = torch.full((2 * grid * variant.rows * (d + 4),), float("nan"))
    counters = torch.zeros(grid, dtype=torch.int32)
    params = _Params(
        query.data_ptr(),
        out.data_ptr(),
        batch.cache.data_ptr(),
        batch.block_table.data_ptr(),
        batch.seq_lens.data_ptr(),
        batch.query_start_loc.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        partial.data_ptr(),
        counters.data_ptr(),
        *query.stride()[:2],
        *out.stride()[:2],
        *batch.cache.stride()[:2],
        batch.block_table.stride(0),
        batch.seq_lens.shape[0],
        kv_heads,
        group,
        max_query_len,
        window or 0,
        scale / math.sqrt(d) * math.log2(math.e),
        1 / math.sqrt(d),
        (soft_cap or 0.0) * math.log2(math.e),
    )
    compiled(variant)(ctypes.byref(params), grid)
    assert not counters.any(), "counters are left zero"
    assert (out[tokens:] == 7).all(), "rows of no request are left alone"
    return out[:tokens]


def load_context(cache, block_table, first, start_loc, longest, key, value, fmt):
    """What `context.load_context` computes, on CPU tensors."""
    variant, params, grid = context._arguments(cache, block_table, first, start_loc, longest, key, value, fmt)
    compiled(variant)(ctypes.byref(params), grid)
