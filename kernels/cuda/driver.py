"""The few calls of CUDA's driver that a compiled kernel needs: load, occupancy, launch on torch's stream."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .nvrtc import CudaError, load_cubin
from .variant import Program, Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """What decides how a kernel is built. ``arch``: compute capability, 90 for 9.0. Shared memory in bytes."""

    arch: int
    multiprocessors: int
    shared_per_multiprocessor: int
    shared_per_block: int


@cache
def device_facts(index: int) -> Device:
    """Raises CudaError where this is not CUDA. Needs no context."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise CudaError("no CUDA device")
    p = torch.cuda.get_device_properties(index)
    # 1 KiB of each block is the system's.
    return Device(
        10 * p.major + p.minor,
        p.multi_processor_count,
        p.shared_memory_per_multiprocessor,
        p.shared_memory_per_block_optin,
    )


def device_index(device: torch.device) -> int:
    """Of a CUDA device, the current one where ``device`` names none."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _warn(what: str, reason: str) -> None:
    logger.warning("The CUDA %s is not used, the slower portable one is: %s", what, reason)


def built(what: str, build: Callable[[], object]) -> bool:
    """Whether ``build``, which makes the kernel named ``what``, raises no CudaError. Each reason is logged once."""
    try:
        build()
    except CudaError as error:
        _warn(what, str(error))
        return False
    return True


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except (ImportError, OSError, RuntimeError) as error:
        raise CudaError(f"cuda-bindings is not usable: {error}") from error
    return driver


def _check(result: tuple[Any, ...], what: str) -> Any:
    status, *values = result
    if int(status) != 0:
        raise CudaError(f"{what}: {status.name}")
    return values[0] if values else None


_MIN_ARCH = 80  # asynchronous copies, bf16 MMAs
_OVERLAP_ARCH = 90  # programmatic dependent launch


class Function:
    """A loaded ``variant`` on one device. Raises CudaError where it cannot be built or loaded."""

    def __init__(self, variant: Program, index: int) -> None:
        facts = device_facts(index)
        if facts.arch < _MIN_ARCH:
            raise CudaError(f"compute capability {facts.arch / 10} is below {_MIN_ARCH / 10}")
        cubin = load_cubin(variant, facts.arch)
        driver = _driver()
        with torch.cuda.device(index):
            torch.cuda.current_stream()
            torch.empty(1, device="cuda")  # the driver needs torch's context
            self._module = _check(driver.cuModuleLoadData(cubin), "cuModuleLoadData")
            self._function = _check(driver.cuModuleGetFunction(self._module, variant.entry.encode()), "cuModuleGetFunction")
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, attribute, variant.shared_bytes), "cuFuncSetAttribute")
        self._threads, self._shared = variant.threads, variant.shared_bytes
        self._driver = driver
        self._overlaps = facts.arch >= _OVERLAP_ARCH

    def launch(self, grid: int, params: ctypes.Structure, stream: int, overlap: bool = False) -> None:
        """Starts ``grid`` CTAs on ``stream``. ``params`` is copied by the driver. Raises CudaError.

        overlap: where the device can, already when all CTAs of the stream's last kernel have said `launch_dependents`; the kernel
        itself waits for that one's results.
        """
        pointer = ctypes.c_void_p(ctypes.addressof(params))
        shape = grid, 1, 1, self._threads, 1, 1, self._shared, stream
        if overlap and self._overlaps:
            config = _overlapping(self._driver, shape)
            _check(self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointer), 0), "cuLaunchKernelEx")
        else:
            _check(self._driver.cuLaunchKernel(self._function, *shape, ctypes.addressof(pointer), 0), "cuLaunchKernel")


def _overlapping(driver: Any, shape: tuple[int, ...]) -> Any:
    """A launch of programmatic dependence on the kernel before it."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.blockDimY, config.blockDimZ = shape[:6]
    config.sharedMemBytes, config.hStream, config.attrs, config.numAttrs = shape[6], shape[7], [attribute], 1
    return config


class Kernel(Function):
    """A loaded decode. ``grid``: CTAs that run at once; the launch's size, whatever the batch."""

    def __init__(self, variant: Variant, index: int) -> None:
        super().__init__(variant, index)
        driver = _driver()
        with torch.cuda.device(index):
            ctas = _check(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, self._threads, self._shared),
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            )
        if ctas == 0:
            raise CudaError("the decode kernel does not fit this device")
        # More would not fit the scratch, which is planned before anything is compiled.
        self.grid = device_facts(index).multiprocessors * min(ctas, variant.tuning.ctas)
