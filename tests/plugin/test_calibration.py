"""Calibration files: what is read back, what is told apart, what is refused at start-up."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_turboquant.calibration_file import (
    CalibrationFileError,
    Identity,
    configured_identity,
    fingerprint,
    load,
    mismatch,
    save,
)
from vllm_turboquant.config import TurboQuantError
from vllm_turboquant.kernels.basis import KeyBasis, key_basis

from .conftest import EngineConfig
from .refused import check_sentence

RANKS, LAYERS = 2, {"model.layers.0.attn": (2, 32), "model.layers.1.attn": (1, 48)}
IDENTITY = Identity(
    model="some/model",
    revision=None,
    architecture="LlamaForCausalLM",
    hidden_size=256,
    vocabulary=1024,
    model_layers=6,
    dtype="bfloat16",
    fingerprints=("a", "b"),
    layers=LAYERS,
    positions=8192,
    recipe={"tokens": 2048},
)


def random_basis(heads: int, d: int, generator: torch.Generator) -> KeyBasis:
    root = torch.randn(heads, d, d, generator=generator, dtype=torch.float64)
    return key_basis(root @ root.mT + d * torch.eye(d), torch.randn(heads, 3, d, generator=generator), bucket=1024)


@pytest.fixture
def bases(seed: int) -> list[dict[str, KeyBasis]]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: random_basis(*shape, generator) for name, shape in LAYERS.items()} for _ in range(RANKS)]


@pytest.fixture
def written(tmp_path: Path, bases: list[dict[str, KeyBasis]]) -> Path:
    path = tmp_path / "new" / "calibration.safetensors"
    save(path, IDENTITY, bases)
    return path


def test_file_gives_back_what_was_saved(written: Path, bases: list[dict[str, KeyBasis]]) -> None:
    for rank in range(RANKS):
        identity, loaded = load(written, rank)
        assert identity == IDENTITY and mismatch(identity, IDENTITY) is None
        assert loaded.keys() == LAYERS.keys()
        for name, basis in loaded.items():
            for part in ("forward", "inverse", "means", "sink_mean"):
                assert torch.equal(getattr(basis, part), getattr(bases[rank][name], part))
            assert basis.bucket == 1024
    assert [path.name for path in written.parent.iterdir()] == [written.name], "scratch files stay behind"


def test_file_that_is_not_whole_is_not_used(written: Path, seed: int) -> None:
    """Cut anywhere, or one bit of any part turned: an error in words, never tensors."""
    rng, whole = random.Random(seed), written.read_bytes()
    for length in (0, 7, 8, *(rng.randrange(9, len(whole)) for _ in range(20)), len(whole) - 1):
        written.write_bytes(whole[:length])
        with pytest.raises(CalibrationFileError):
            load(written, 0)
    for position in (0, 8, *(rng.randrange(len(whole)) for _ in range(60)), len(whole) - 1):
        broken = bytearray(whole)
        broken[position] ^= 1 << rng.randrange(8)
        written.write_bytes(broken)
        try:
            identity, _ = load(written, 0)
        except CalibrationFileError:
            continue
        # Not every bit of the description is vouched for by the checksum, but then the description says something else.
        assert mismatch(identity, IDENTITY) or replace(identity, model="", recipe={}, revision=None) == replace(
            IDENTITY, model="", recipe={}
        ), f"bit of byte {position} turned unnoticed"


def test_other_files_are_told_apart(written: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(written, framework="pt") as file:
        header = json.loads(file.metadata()["turboquant-calibration"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    with pytest.raises(CalibrationFileError, match="is not a calibration file"):
        load(other, 0)
    save_file(tensors, other, metadata={"turboquant-calibration": json.dumps(header | {"format": 99})})
    with pytest.raises(CalibrationFileError, match="has format 99, allowed is 2"):
        load(other, 0)
    for lost in header:
        save_file(tensors, other, metadata={"turboquant-calibration": json.dumps({k: v for k, v in header.items() if k != lost})})
        with pytest.raises(CalibrationFileError, match="has a broken header"):
            load(other, 0)
    for broken in ("7", "[]", '"text"', "{", '{"format": 2, "checksum": "", "identity": {"layers": []}}'):
        save_file(tensors, other, metadata={"turboquant-calibration": broken})
        with pytest.raises(CalibrationFileError, match="has a broken header"):
            load(other, 0)
    with pytest.raises(CalibrationFileError, match="cannot be read"):
        load(tmp_path / "missing", 0)
    with pytest.raises(CalibrationFileError, match="lacks tensors of layer"):
        load(written, RANKS)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "Qwen2ForCausalLM"}, "another model"),
    "hidden size": ({"hidden_size": 512}, "hidden_size 256 instead of 512"),
    "dtype": ({"dtype": "float16"}, "with --dtype bfloat16 instead of float16"),
    "longer": ({"positions": 8193}, "at up to 8192 tokens, 8193 are to be served"),
    "shorter": ({"positions": 100}, ""),
    "ranks": ({"fingerprints": ("a",)}, "tensor parallel size 2 instead of 1"),
    "weights": ({"fingerprints": ("a", "c")}, "other weights"),
    "not loaded yet": ({"fingerprints": ("", ""), "layers": {}}, ""),
    "fewer layers": ({"layers": {"model.layers.0.attn": (2, 32)}}, ""),
    "another layer": ({"layers": LAYERS | {"model.layers.2.attn": (2, 32)}}, "lacks layer model.layers.2.attn"),
    "other heads": ({"layers": {"model.layers.0.attn": (1, 32)}}, "lacks layer model.layers.0.attn"),
    "name": ({"model": "/elsewhere", "revision": "main"}, ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_file_fits(change: str) -> None:
    fields, reason = CHANGES[change]
    found = mismatch(IDENTITY, replace(IDENTITY, **fields))
    assert (found is None) if not reason else (found is not None and reason in found), found
    # The automatic file has another name for anything that could make another calibration.
    assert replace(IDENTITY, **fields).file_name() != IDENTITY.file_name()


class _Weights(torch.nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def test_fingerprint(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(300, 700, generator=generator).bfloat16()
    small = torch.randn(10, generator=generator)
    codes = torch.randint(-128, 127, (64, 33), generator=generator).to(torch.int8)
    original = fingerprint(_Weights(big=big, small=small, codes=codes))
    assert original == fingerprint(_Weights(codes=codes.clone(), big=big.clone(), small=small.clone()))
    touched = small.clone()
    touched[3] += 1e-6
    others = {
        "one value of a small tensor": _Weights(big=big, small=touched, codes=codes),
        "all of a big one": _Weights(big=big * 1.1, small=small, codes=codes),
        "dtype": _Weights(big=big.half(), small=small, codes=codes),
        "shape": _Weights(big=big.view(700, 300), small=small, codes=codes),
        "codes": _Weights(big=big, small=small, codes=codes + 1),
        "name": _Weights(large=big, small=small, codes=codes),
    }
    found = {original} | {fingerprint(weights) for weights in others.values()}
    assert len(found) == 1 + len(others)
    # bfloat16 values in float32: half of the bytes are 0, and samples must not fall on those only.
    wide = torch.randn(512, 513, generator=generator).bfloat16().float()
    assert fingerprint(_Weights(x=wide)) != fingerprint(_Weights(x=(wide * 3).bfloat16().float()))
    # As quantisation methods leave them: a transposed view.
    assert fingerprint(_Weights(x=wide.t())) != fingerprint(_Weights(x=(wide * 2).t()))


def _file_for(config: Any, path: Path, bases: list[dict[str, KeyBasis]], **changes: Any) -> dict[str, Any]:
    facts = configured_identity(config.model_config, RANKS)
    save(path, replace(facts, fingerprints=("a", "b"), layers=LAYERS, **changes), bases)
    return {"additional_config": {"turboquant": {"calibration": str(path)}}}


def test_a_named_file_is_checked_before_anything_starts(
    engine_config: EngineConfig, tmp_path: Path, bases: list[dict[str, KeyBasis]]
) -> None:
    path = tmp_path / "calibration.safetensors"
    fitting = _file_for(engine_config(), path, bases)
    assert engine_config(tensor_parallel_size=RANKS, **fitting).cache_config.cache_dtype == "turboquant"
    assert engine_config(tensor_parallel_size=RANKS, max_model_len=100, **fitting) is not None
    # What the file was made for, what is served, and what is said.
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"hidden_size": 512}, {"tensor_parallel_size": RANKS}, "hidden_size 512 instead of 256"),
        ({"positions": 4096}, {"tensor_parallel_size": RANKS}, "at up to 4096 tokens, 8192 are to be served"),
        ({}, {}, "tensor parallel size 2 instead of 1"),
    ]
    for made, served, reason in cases:
        named = _file_for(engine_config(), path, bases, **made)
        with pytest.raises(TurboQuantError) as caught:
            engine_config(**served, **named)
        check_sentence(str(caught.value), ("--additional-config", str(path), reason, 'make one with "vllm-turboquant calibrate"'))
    with pytest.raises(TurboQuantError) as caught:
        engine_config(tensor_parallel_size=RANKS, pipeline_parallel_size=2, **_file_for(engine_config(), path, bases))
    check_sentence(str(caught.value), ("--additional-config", str(path), "--pipeline-parallel-size 2; allowed is 1", 'set "off"'))
