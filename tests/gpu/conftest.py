"""Tests that need a card: skipped without one, saying so."""

from pathlib import Path

import pytest
import torch

from .engines import shared_folder


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where test workers share what engines answered."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct's real weights."""
    pytest.importorskip("vllm")
    from vllm_turboquant.demo import default_dir

    path = Path(default_dir())
    if not (path / "config.json").is_file():
        pytest.skip("needs the demo model: make demo-model")
    return str(path)


@pytest.fixture(params=("portable", "cuda"))
def which(request):
    """Which decode is tested."""
    return request.param


@pytest.fixture
def engines(tmp_path, seed):
    """Tiny engines to start."""
    pytest.importorskip("vllm")
    from .tiny_engines import CARD, Engines

    return Engines(tmp_path, seed, CARD)
