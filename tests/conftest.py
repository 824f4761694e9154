"""Shared by all tests: cores divided between workers, Triton's interpreter where there is no GPU, a printed seed per test."""

import importlib
import importlib.util
import os
import random

import pytest

ON_GPU = os.path.exists("/dev/nvidiactl")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Each worker's torch would start a thread a core; read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if not ON_GPU:
        # Engines count the cores that they may run on, and threads of two that wait for each other in loops take ten times as
        # long as on a core of their own.
        cores, worker = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.environ["TEST_CORES"] = ",".join(map(str, cores))
        os.sched_setaffinity(0, cores[worker::workers] or {cores[worker % len(cores)]})

if not ON_GPU and importlib.util.find_spec("triton"):
    # Triton chooses between compiler and interpreter when a function is decorated: its own library's functions at import,
    # which torch may do, and ours at the first import by any test. Unset again, so that servers which tests start do not
    # inherit it; `kernels/interpreted.py` sets it for its runs.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")
    for module in ("combine", "decode", "prefill", "recent_attend", "recent_keep", "store"):
        importlib.import_module(f"vllm_turboquant.kernels.{module}")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def seed() -> int:
    """A new seed each run; ``TEST_SEED=n`` repeats one."""
    value = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"TEST_SEED={value}")
    return value
