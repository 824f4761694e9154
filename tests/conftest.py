"""Shared by all tests: Triton's interpreter where there is no GPU, and a fresh printed seed per test."""

import importlib
import importlib.util
import os
import random

import pytest

if not os.path.exists("/dev/nvidiactl") and importlib.util.find_spec("triton"):
    # Triton chooses between compiler and interpreter when a function is decorated, its own library's at import, which
    # torch may do. Unset again, so that servers which tests start do not inherit it; `test_triton.py` sets it for its runs.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def seed() -> int:
    """A new seed each run; ``TEST_SEED=n`` repeats one."""
    value = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"TEST_SEED={value}")
    return value
