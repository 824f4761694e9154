"""Calibration files, rotary modules as matrices, and the key bias that weights tell. Whole engines: tests/server."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
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
from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.attention import attend_raw
from vllm_turboquant.kernels.basis import KeyBasis, key_basis
from vllm_turboquant.kernels.format import page_format
from vllm_turboquant.rotary import mean_turn, turns

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
    fingerprints=("a", "b"),
    layers=LAYERS,
    positions=8192,
    recipe={"tokens": 2048},
)


def random_basis(heads: int, d: int, generator: torch.Generator) -> KeyBasis:
    root = torch.randn(heads, d, d, generator=generator, dtype=torch.float64)
    return key_basis(root @ root.mT + d * torch.eye(d), torch.randn(heads, d, generator=generator))


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
            for part in ("forward", "inverse", "mean"):
                assert torch.equal(getattr(basis, part), getattr(bases[rank][name], part))
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
    with pytest.raises(CalibrationFileError, match="has format 99, allowed is 1"):
        load(other, 0)
    with pytest.raises(CalibrationFileError, match="cannot be read"):
        load(tmp_path / "missing", 0)
    with pytest.raises(CalibrationFileError, match="lacks tensors of layer"):
        load(written, RANKS)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "Qwen2ForCausalLM"}, "another model"),
    "hidden size": ({"hidden_size": 512}, "hidden_size 256 instead of 512"),
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


def test_calibration_waits_for_gpu_kernels() -> None:
    from types import SimpleNamespace

    from vllm_turboquant.config import BASIS_ON_GPU, TurboQuantSettings
    from vllm_turboquant.refusals import _check_calibration

    assert not BASIS_ON_GPU, "calibration on a GPU is not refused any more: this test and its refusal can go"
    gpu = SimpleNamespace(is_cuda=lambda: True)
    _check_calibration(TurboQuantSettings("off"), None, None, gpu)
    with pytest.raises(TurboQuantError) as caught:
        _check_calibration(TurboQuantSettings("auto"), None, None, gpu)
    check_sentence(str(caught.value), ("--additional-config", "'auto'", "on a GPU yet", 'allowed is "off"', "leave it out"))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
ROPES: dict[str, dict[str, Any]] = {
    "neox": {},
    "gptj": {"is_neox_style": False},
    "partial": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "partial gptj": {"is_neox_style": False, "rope_parameters": {"partial_rotary_factor": 0.25}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 512}},
    "yarn": {"rope_parameters": YARN},  # multiplies keys by a factor
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
}
HEAD, LENGTH = 64, 1024


@pytest.fixture
def rope(engine_config: EngineConfig) -> Iterator[Callable[..., Any]]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    def make(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        options = {"max_position": LENGTH, "is_neox_style": True, **ROPES[kind]}
        parameters = {"rope_theta": 10000.0, "rope_type": "default", **options.pop("rope_parameters", {})}
        return get_rope(HEAD, rope_parameters=parameters, dtype=dtype, **options, **changes)

    with set_current_vllm_config(engine_config()):
        yield make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROPES)
def test_turns_do_to_a_key_what_the_module_does(kind: str, dtype: torch.dtype, rope: Callable[..., Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = rope(kind, dtype)
    table = module.cos_sin_cache
    key = torch.randn(1, HEAD, generator=generator)
    start, shift = (int(x) for x in torch.randint(1, LENGTH // 2, (2,), generator=generator))
    places = torch.tensor([start, shift, start + shift])
    there, by, further = turns(module, places)
    assert module.cos_sin_cache is table and table.dtype == dtype, "the served table was replaced"
    positions = torch.tensor([0, start, start + shift])
    _, direct = _unchanged(module, positions, key.expand(3, -1))
    # Tables in bfloat16 err by 2^-8 a number at most, and so does the factor; in float32 angles of 1000 radians err by 1e-4.
    bound = 1e-3 if dtype == torch.float32 else 2e-2
    size = float(direct.norm(dim=-1).max())
    assert (there @ direct[0] - direct[1]).norm() < bound * size
    assert (further @ direct[0] - direct[2]).norm() < bound * size
    assert (by @ direct[1] - direct[2]).norm() < bound * size, "a shift is not the turn of its length"
    assert (there @ there.T - torch.eye(HEAD)).abs().max() < bound
    # The check can fail: it is not the turn of another position.
    assert (turns(module, places[:1] + 100)[0] @ direct[0] - direct[1]).norm() > 5 * bound * size


def _unchanged(module: Any, positions: torch.Tensor, key: torch.Tensor) -> Any:
    """The module's own answer in float32, its table put back."""
    kept = dict(module._buffers)
    result = module.forward_native(positions, key.clone(), key.clone())
    module._buffers.update(kept)
    return result


def test_mean_turn_averages_all_positions(rope: Callable[..., Any]) -> None:
    for kind in ("neox", "yarn"):
        module = rope(kind)
        _, direct = _unchanged(module, torch.arange(LENGTH), torch.eye(HEAD).flatten().expand(LENGTH, -1))
        exact = direct.view(LENGTH, HEAD, HEAD).mean(0).T
        # Sums of 1024 fp32 numbers of size 1, in two orders.
        assert (mean_turn(module, LENGTH) - exact).abs().max() < 1e-5
        # Drawn positions, one of each quarter of the range: 1 / sqrt(256) an average, and four times that at most.
        drawn = (mean_turn(module, LENGTH, samples=256) - exact).abs().max()
        assert 0 < drawn < 4 / 256**0.5


def test_a_module_that_does_not_rotate_is_told(rope: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = rope("neox")
    monkeypatch.setattr(module, "cos_sin_cache", module.cos_sin_cache * torch.linspace(1, 2, LENGTH)[:, None])
    with pytest.raises(ValueError, match="does more than rotate"):
        turns(module, torch.tensor([100, 900]))


def qwen2_attention(config: Any, norm: bool = False) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models.qwen2 import Qwen2Attention
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
        return Qwen2Attention(
            hidden_size=8 * HEAD,
            num_heads=8,
            num_kv_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            max_position=8192,
            cache_config=config.cache_config,
            qk_norm=norm,
            prefix="model.layers.0.self_attn",
        )


def test_key_bias_out_of_the_box(one_rank: None, engine_config: EngineConfig, seed: int) -> None:
    """Keys of Qwen2's kind: a bias of norm 600 in slowly turning dims, beside which what tells keys apart is small."""
    from vllm_turboquant.key_bias import bias_bases

    generator = torch.Generator().manual_seed(seed)
    attention = qwen2_attention(engine_config())
    hidden, tokens = 8 * HEAD, 512
    attention.qkv_proj.weight.data = torch.randn(12 * HEAD, hidden, generator=generator) * hidden**-0.5
    bias = torch.zeros(12, HEAD)
    # Four pairs of the slowest eighth of the dims: over 8192 positions they turn by less than a radian.
    slow = torch.tensor([28, 29, 30, 31])
    for dims in (slow, slow + HEAD // 2):
        bias[8:10, dims] = 600 * 8**-0.5 * torch.randn(2, 4, generator=generator).sign()
    attention.qkv_proj.bias.data = bias.flatten()
    x = torch.randn(tokens, hidden, generator=generator)
    qkv = x @ attention.qkv_proj.weight.T + attention.qkv_proj.bias
    q, k, v = qkv.split([8 * HEAD, 2 * HEAD, 2 * HEAD], dim=1)
    q, k = attention.rotary_emb.forward_native(torch.arange(tokens) + 4000, q, k)
    q, k, v = (part.reshape(tokens, -1, HEAD) for part in (q, k, v))

    found = bias_bases(attention, {"attn": attention.attn}, 8192)
    errors = {}
    exact = attend_raw(q, k, v, HEAD**-0.5)
    fmt = page_format("turboquant", HEAD)
    for name, basis in (("plain", None), ("bias", found["attn"])):
        cache = torch.zeros(tokens // 16, 2, 16, fmt.slot_bytes, dtype=torch.uint8)
        reference.store(k, v, cache, torch.arange(tokens), fmt, basis=basis)
        table, starts = torch.arange(tokens // 16)[None], torch.tensor([0, tokens])
        keys, _ = reference.load_vectors(cache, table[0], fmt, basis)
        got = reference.attend(q, cache, table, torch.tensor([tokens]), starts, fmt, HEAD**-0.5, basis=basis)
        errors[name] = float((keys - k).pow(2).mean()), float((got - exact).norm() / exact.norm())
    print({name: f"keys {key:.3g}, attention {out:.3g}" for name, (key, out) in errors.items()})
    # Squared, a code errs by .008 of what it encodes: (600^2 + 64) of it, or what is left when the bias turned a little.
    assert errors["bias"][0] < errors["plain"][0] / 30
    assert errors["bias"][1] < errors["plain"][1] / 3


def test_layers_whose_bias_is_not_their_keys_mean(one_rank: None, engine_config: EngineConfig) -> None:
    from vllm_turboquant.key_bias import bias_bases

    attention = qwen2_attention(engine_config())
    layers = {"attn": attention.attn}
    attention.qkv_proj.bias.data.fill_(1.0)
    assert bias_bases(attention, layers, 8192).keys() == {"attn"}
    attention.qkv_proj.bias.data[8 * HEAD : 10 * HEAD] = 0.0
    assert not bias_bases(attention, layers, 8192), "the keys' share of the bias is 0"
    attention.qkv_proj.bias = None
    assert not bias_bases(attention, layers, 8192)
    normed = qwen2_attention(engine_config(), norm=True)
    normed.qkv_proj.bias.data.fill_(1.0)
    assert not bias_bases(normed, {"attn": normed.attn}, 8192)
