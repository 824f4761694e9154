"""CUDA C++ to cubins through NVRTC, kept on disk: the second process of a machine compiles nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from .. import private
from .variant import Program, source

# No header is included and fp32 stays IEEE where the sources do not say otherwise.
_OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--disable-warnings")


class CudaError(RuntimeError):
    """A CUDA kernel cannot be built or started here; the message says why."""


def cache_folder() -> Path:
    """``turboquant/cubin`` under ``VLLM_CACHE_ROOT``, by default ``~/.cache/vllm``."""
    root = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vllm")
    return Path(os.path.expanduser(root)) / "turboquant" / "cubin"


def compile_cubin(variant: Program, arch: int, extra: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """Compiles ``variant`` for ``sm_<arch>``, past any cache. Returns the cubin and the compiler's log.

    Raises CudaError where NVRTC is missing or refuses.
    """
    try:
        from cuda.bindings import nvrtc

        ok = nvrtc.nvrtcResult.NVRTC_SUCCESS
        options = [*_OPTIONS, f"--gpu-architecture=sm_{arch}", *extra]
        options += [f"-D{name}={value}" for name, value in variant.macros().items()]
        status, program = nvrtc.nvrtcCreateProgram(source(*variant.sources).encode(), f"{variant.entry}.cu".encode(), 0, [], [])
    except (ImportError, OSError, RuntimeError) as error:  # a missing libnvrtc shows at the first call
        raise CudaError(f"NVRTC is not usable: {error}") from error
    if status != ok:
        raise CudaError(f"NVRTC: {status.name}")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        # NVRTC writes into what it is given. bytes would be wrong: those of length 1 are shared by the whole interpreter.
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.rstrip(b"\0\n").decode(errors="replace")
        if status != ok:
            raise CudaError(f"NVRTC does not compile {variant.entry} for sm_{arch}: {status.name}\n{text}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin), text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _version() -> str:
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise CudaError(f"NVRTC is not usable: {error}") from error
    return f"{major}.{minor}"


def load_cubin(variant: Program, arch: int) -> bytes:
    """The cubin of ``variant``, from the disk cache if it is there whole and nobody else can have put it there.

    Raises CudaError as :func:`compile_cubin` does. A cache that cannot be used or written costs time, not correctness.
    """
    key = repr((source(*variant.sources), sorted(variant.macros().items()), _OPTIONS, arch, _version()))
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    kept = _kept(path)
    if kept is not None:
        return kept
    cubin, _ = compile_cubin(variant, arch)
    with contextlib.suppress(OSError):
        private.write(path, lambda scratch: Path(scratch).write_bytes(hashlib.sha256(cubin).digest() + cubin))
    return cubin


def _kept(path: Path) -> bytes | None:
    """What follows the file's first 32 bytes, if they are its SHA-256."""
    if private.problem(path) is not None:
        return None
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    return whole[32:] if len(whole) > 32 and hashlib.sha256(whole[32:]).digest() == whole[:32] else None
