"""The self-test of ``vllm-turboquant doctor``: passes with the kernels as they are, fails with kernels that are wrong."""

from __future__ import annotations

import pytest
import torch

from vllm_turboquant import selftest
from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.format import DEFAULT_PRESET, PRESETS

from .interpreted import interpret  # noqa: F401

CPU = torch.device("cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_reference_passes(preset: str) -> None:
    selftest.check_reference(preset)


def test_store_that_loses_values(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.store

    def store(key: torch.Tensor, value: torch.Tensor, *rest: object) -> None:
        right(key, value.roll(1, 0), *rest)

    monkeypatch.setattr(reference, "store", store)
    with pytest.raises(selftest.SelfTestError, match=f"{DEFAULT_PRESET} reads stored values back with an error of 1[34]"):
        selftest.check_reference(DEFAULT_PRESET)


@pytest.mark.parametrize("wrong", ["a token more", "nothing written", "scale"])
def test_attention_that_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.attend

    def attend(
        query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, *rest: object
    ) -> torch.Tensor:
        if wrong == "a token more":
            return right(query, cache, table, torch.where(lengths % 16 != 0, lengths + 1, lengths), *rest)
        out = right(query, cache, table, lengths, *rest)
        return out * 1.001 if wrong == "scale" else out * float("nan")

    monkeypatch.setattr(reference, "attend", attend)
    with pytest.raises(selftest.SelfTestError, match="attention to turboquant pages is off by"):
        selftest.check_reference(DEFAULT_PRESET)


@pytest.mark.parametrize("preset", [DEFAULT_PRESET, "turboquant-k8v4", "turboquant-k2v2"])
def test_portable_kernels_pass(preset: str) -> None:
    """In Triton's interpreter."""
    selftest.check_portable(preset, CPU)


def test_portable_decode_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_turboquant.kernels import decode

    def shifted(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, *rest: object) -> None:
        right(query, cache, table.flip(0), *rest)

    right = decode.decode
    monkeypatch.setattr(decode, "decode", shifted)
    with pytest.raises(selftest.SelfTestError, match="portable decode of turboquant is off by"):
        selftest.check_portable(DEFAULT_PRESET, CPU)
