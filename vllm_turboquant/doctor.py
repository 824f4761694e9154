"""``vllm-turboquant doctor`` of this machine: every fact that serving rests on, in the order in which serving meets them."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from .config import TurboQuantError
from .doctor_cache import cache, calibrations
from .facts import Fact, failed, ok, warning
from .kernels.format import DEFAULT_PRESET, PRESETS
from .supported import SUPPORTED, structural_problems, supported_version

PLUGINS = "vllm.general_plugins"
ENTRY_POINT = "vllm_turboquant:register"
MIN_PYTHON = (3, 11)
INSTALL = f"pip install 'vllm=={SUPPORTED[-1]}.*'"


def local_facts() -> list[Fact]:
    """Stops after a failure that what follows would only repeat."""
    facts: list[Fact] = []
    for fact in _facts():
        facts.append(fact)
        if fact.state == "failed" and fact.name in ("torch", "vllm", "plugin", "platform"):
            break
    return facts


def _facts() -> Iterator[Fact]:
    yield _python()
    yield _torch()
    yield _vllm()
    yield _plugin()
    yield _command()
    yield _platform()
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        yield _flash_attention()
        yield _nvrtc()
        yield from _gpu_kernels()
    else:
        yield _reference()
        yield _compiler()
    yield cache()
    yield from calibrations()


def _python() -> Fact:
    found = platform.python_version()
    if sys.version_info[:2] < MIN_PYTHON:
        return failed("python", f"{found} is too old", "use Python 3.11 or later")
    return ok("python", found)


def _torch() -> Fact:
    try:
        import torch
    except (ImportError, OSError) as error:
        return failed("torch", f"cannot be imported ({error})", f"install vLLM, which brings its own: {INSTALL}")
    return ok("torch", torch.__version__)


def _vllm() -> Fact:
    try:
        import vllm
    except (ImportError, OSError) as error:
        return failed("vllm", f"cannot be imported ({error})", INSTALL)
    series = supported_version(vllm.__version__)
    if series is None:
        return failed("vllm", f"{vllm.__version__} is not supported; supported are {' and '.join(SUPPORTED)}", INSTALL)
    if problems := structural_problems(series):
        return failed("vllm", f"{vllm.__version__} lacks {', '.join(problems)}", f"install an unmodified one: {INSTALL}")
    return ok("vllm", f"{vllm.__version__}, supported")


def _plugin() -> Fact:
    """Whether vLLM itself finds the package and runs its entry point, as every process of a server does."""
    from vllm import envs
    from vllm.plugins import load_general_plugins

    from . import __version__, compat

    found = [entry.name for entry in entry_points(group=PLUGINS) if entry.value == ENTRY_POINT]
    if not found:
        return failed(
            "plugin", "the package is not installed: vLLM sees no such plugin", "pip install vllm-turboquant beside vLLM"
        )
    allowed = envs.VLLM_PLUGINS
    if allowed is not None and found[0] not in allowed:
        cure = f"add {found[0]} to VLLM_PLUGINS or unset it"
        return failed("plugin", f"VLLM_PLUGINS={','.join(allowed)} keeps vLLM from loading {found[0]}", cure)
    load_general_plugins()
    if not compat.active():
        return failed("plugin", "vLLM loaded it and it stayed inactive", "see the line that it logged above")
    return ok("plugin", f"vllm-turboquant {__version__}, loaded by vLLM as {found[0]}")


def _command() -> Fact:
    """The command asks for the distribution's metadata, which a build under another name does not have."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        return failed("vllm serve", "no distribution is called vllm, so the command cannot start", INSTALL)
    where = shutil.which("vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if where is None:
        return warning("vllm serve", "the command vllm is not on the PATH", "activate the environment of vLLM")
    return ok("vllm serve", f"of distribution vllm {found}")


def _platform() -> Fact:
    from vllm.platforms import current_platform

    from .refusals import check_platform

    try:
        check_platform(DEFAULT_PRESET, current_platform)
    except TurboQuantError as error:
        return failed("platform", str(error), "use a CPU or an NVIDIA GPU of compute capability 8.0 or higher")
    if current_platform.is_cuda():
        import torch

        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return ok("platform", f"{torch.cuda.get_device_name()}, compute capability {capability}, {memory:.1f} GiB")
    if os.path.exists("/dev/nvidiactl"):
        return warning("platform", "vLLM runs on the CPU though there is an NVIDIA GPU", f"install the CUDA build: {INSTALL}")
    return ok("platform", "CPU: the reference code attends, right and slow")


def _flash_attention() -> Fact:
    from .refusals import missing_flash_attention

    if missing := missing_flash_attention():
        return failed("prefill", f"this vLLM has no FlashAttention ({missing})", f"install vLLM's CUDA wheel: {INSTALL}")
    return ok("prefill", "FlashAttention of vLLM")


def _nvrtc() -> Fact:
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:
        cure = "pip install cuda-bindings nvidia-cuda-nvrtc; until then portable kernels decode, slower"
        return warning("NVRTC", f"is not usable ({error})", cure)
    return ok("NVRTC", f"{major}.{minor}")


def _each() -> Iterable[str]:
    """The presets, with a bar on terminals."""
    from tqdm import tqdm

    bar: Iterable[str] = tqdm(PRESETS, "self-test", leave=False, disable=None)
    return bar


def _reference() -> Fact:
    from .selftest import SelfTestError, check_reference

    try:
        for preset in _each():
            check_reference(preset)
    except SelfTestError as error:
        return failed("self-test", str(error), "report it with this output")
    return ok("self-test", f"store and attention of {len(PRESETS)} presets agree with float64")


def _gpu_kernels() -> Iterator[Fact]:
    import torch

    from .selftest import SelfTestError, check_cuda, check_portable

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        for preset in _each():
            check_portable(preset, device)
        yield ok("self-test", f"Triton's store and decode of {len(PRESETS)} presets agree with float64")
        fast = [preset for preset in _each() if check_cuda(preset, device)]
    except (SelfTestError, ImportError, OSError, RuntimeError) as error:  # Triton's and CUDA's compilers and launches
        yield failed("self-test", str(error), "report it with this output")
        return
    if DEFAULT_PRESET in fast:
        yield ok("CUDA decode", f"of {', '.join(fast)} agrees with float64")
    else:
        yield warning("CUDA decode", "cannot be built here; portable kernels decode, slower", "see NVRTC and the log above")


def _compiler() -> Fact:
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return ok("C++ compiler", "not needed: TORCH_COMPILE_DISABLE=1")
    name = os.environ.get("CXX") or "g++"
    if shutil.which(name) is None:
        detail = f"there is no {name}: vLLM on a CPU compiles parts of its sampler, and a request for logprobs ends the engine"
        return failed("C++ compiler", detail, f"install {name} or set TORCH_COMPILE_DISABLE=1")
    return ok("C++ compiler", name)
