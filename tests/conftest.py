"""Shared by all tests: a fresh random seed per test, printed so that a failure can be run again."""

import os
import random

import pytest


@pytest.fixture
def seed() -> int:
    """A new seed each run; ``TEST_SEED=n`` repeats one."""
    value = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"TEST_SEED={value}")
    return value
