"""Fixtures of the server tests: at most two servers alive, each started once, all ended at the end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from vllm_turboquant import demo

from . import tiny
from .harness import ServerPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)
            if "+cpu" not in version("vllm"):
                item.add_marker(pytest.mark.skip(reason="these servers run on a CPU; tests/gpu has its own"))


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    servers = ServerPool(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted at the first use on this machine."""
    return demo.ensure()


@pytest.fixture(scope="session")
def tiny_models(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny.write(kind, smollm2, tmp_path_factory.mktemp(kind)) for kind in tiny.KINDS}


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)
