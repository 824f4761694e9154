"""The CUDA kernels on the CPU: their own sources, compiled by the C++ compiler over an emulated warp."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from vllm_turboquant.kernels.cuda import context, launch, turn
from vllm_turboquant.kernels.cuda import store as cuda_store
from vllm_turboquant.kernels.cuda.variant import Tuning, Variant, padded_rows, record_bytes, source

COMPILER = shutil.which("c++") or shutil.which("g++")
HERE = Path(__file__).parent
SMALL = Tuning(2, 2, 2, True)


@functools.cache
def folder():
    return tempfile.mkdtemp(prefix="turboquant-emulated-")


@functools.cache
def compiled(variant):
    """The variant's ``run(params, blocks)``."""
    machine, copies, runner = ((HERE / name).read_text() for name in ("emulator.h", "emulator_copies.h", "emulator.cc"))
    text = "\n".join([machine, copies, *(source(name) for name in variant.sources if name != "ptx"), runner])
    macros = {"SHARED_BYTES": "1"} | variant.macros() | {"ENTRY": variant.entry}
    options = [f"-D{name}={value}" for name, value in macros.items()]
    name = hashlib.sha256(repr((text, options)).encode()).hexdigest()[:16]
    file, library = Path(folder(), f"{name}.cc"), Path(folder(), f"{name}.so")
    file.write_text(text)
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *options, str(file), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).run


def decode(
    batch, query, scale, max_query_len, *, grid=5, tuning=SMALL, window=None, soft_cap=None, sinks=None, basis=None, ends=None,
    lse=None,
):  # fmt: skip
    """What `launch.decode` computes, on CPU tensors with ``grid`` CTAs. Returns the output; checks counters and surroundings."""
    tokens, heads, d = query.shape
    rows = padded_rows(heads // batch.cache.shape[1], max_query_len)
    out = torch.full((tokens + 2, heads, d), 7.0, dtype=query.dtype)
    scratch = torch.full((2 * grid * rows * (d + 4),), float("nan"))
    counters = torch.zeros(grid, dtype=torch.int32)
    turned = None
    if basis is not None:
        turned = torch.full((tokens * heads * record_bytes(d, basis.buckets) // 4,), float("nan"))
        turning, params, ctas = turn._arguments(query, turned, batch.fmt, scale, basis, grid)
        compiled(turning)(ctypes.byref(params), ctas)
    options, params = launch._arguments(
        query, batch.cache, batch.block_table, batch.seq_lens, batch.query_start_loc, out[:tokens], scratch, turned, counters,
        batch.fmt, scale, max_query_len, window, soft_cap, sinks, basis, ends, lse,
    )  # fmt: skip
    compiled(Variant(options, tuning))(ctypes.byref(params), grid)
    assert not counters.any(), "counters are left zero"
    assert (out[tokens:] == 7).all(), "rows of no request are left alone"
    return out[:tokens]


def load_context(cache, block_table, first, start_loc, longest, key, value, fmt, basis=None):
    """What `context.load_context` computes, on CPU tensors."""
    variant, params, grid = context._arguments(cache, block_table, first, start_loc, longest, key, value, fmt, basis)
    compiled(variant)(ctypes.byref(params), grid)


def store(key, value, cache, slots, fmt, basis=None, positions=None):
    """What `cuda.store.store` computes, on CPU tensors."""
    variant, params, grid = cuda_store._arguments(key, value, cache, slots, fmt, basis, positions)
    compiled(variant)(ctypes.byref(params), grid)
