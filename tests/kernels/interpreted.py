"""The portable GPU kernels as Triton's interpreter runs them. To be imported by tests alone: skips where kernels run compiled."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run compiled here: see tests/gpu", allow_module_level=True)
pytest.importorskip("triton")

from vllm_turboquant.kernels.combine import plan_decode
from vllm_turboquant.kernels.decode import decode
from vllm_turboquant.kernels.prefill import load_context
from vllm_turboquant.kernels.recent_attend import attend_recent
from vllm_turboquant.kernels.recent_keep import keep
from vllm_turboquant.kernels.store import store


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Two or three splits instead of 64: the interpreter runs one program after the other.
    monkeypatch.setattr("vllm_turboquant.kernels.combine._PROGRAMS", 16)


__all__ = ["attend_recent", "decode", "interpret", "keep", "load_context", "plan_decode", "store"]
