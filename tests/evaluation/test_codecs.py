"""Emulated dtypes against vLLM 0.33's own kernels, and what every codec must do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.plugin.conftest import require_033
from vllm_turboquant.evaluation import codecs
from vllm_turboquant.evaluation.codecs import NAMES, Case, decoded
from vllm_turboquant.kernels.format import PRESETS
from vllm_turboquant.kernels.rotation import hadamard

VLLM = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")


@pytest.fixture
def vectors(seed):
    """Keys with a constant part and a few large coordinates, values without; a head is 64 wide."""
    rng = torch.Generator().manual_seed(seed)
    key = torch.randn(12, 2, 64, generator=rng) * 3 + torch.randn(2, 64, generator=rng) * 5
    return {"key": key, "value": torch.randn(12, 2, 64, generator=rng), "query": torch.randn(2, 64, generator=rng)}


@pytest.fixture
def kernels_033(vectors, tmp_path):
    """What vLLM 0.33's kernels make of the vectors, under Triton's interpreter."""
    code = require_033()
    torch.save(vectors, tmp_path / "in.pt")
    environment = {**os.environ, "PYTHONPATH": str(code), "TRITON_INTERPRET": "1", "VLLM_TARGET_DEVICE": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("rivals_033.py")), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(tmp_path / "out.pt")


def test_emulations_are_vllms_kernels(vectors, kernels_033):
    key, value, query = vectors["key"], vectors["value"], vectors["query"]
    for bits, theirs in kernels_033["centroids"].items():
        assert torch.equal(codecs.vllm_centroids(64, bits), theirs), bits
    turn = hadamard(64).float()
    for name in VLLM:
        k, v = decoded(Case(name), key, value, 0, 1, None)
        their_k, their_v = kernels_033[name]
        # Their function for whole caches rounds what it gives back to fp16, and keeps keys rotated.
        assert torch.equal(v.half().float(), their_v), name
        if name == "turboquant_k8v4":
            # Triton's interpreter rounds to e4m3 without carrying into the exponent, and subnormals otherwise; cards do it right.
            sound = (k.abs().log2().floor() == key.abs().log2().floor()) & (key.abs() >= 2**-6)
            assert torch.equal(k[sound], their_k[sound]) and sound.float().mean() > 0.9
            continue
        turned = k @ turn
        # One unit in the last place of fp16, where the way back and forth in fp32 falls on the other side of a rounding edge.
        assert (turned - their_k).abs().max() <= 2**-10 * their_k.abs().max(), name
        scores = torch.einsum("hd,lhd->hl", query, k) * 64**-0.5
        ours = torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
        # Their decode kernel does not round; fp32 sums of 64 products in another order.
        assert torch.allclose(ours, kernels_033[f"{name} attention"], rtol=1e-4, atol=1e-5), name
    assert torch.equal(codecs.int4_signs(64), kernels_033["int4 signs"])
    codes_k, step_k, codes_v, step_v = kernels_033["int4"]
    for x, codes, step in ((key, codes_k, step_k), (value, codes_v, step_v)):
        bits = step.view(torch.int32)
        y = (codes.float() - (bits & 15)[..., None]) * (bits & -16).view(torch.float32)[..., None]
        theirs = (y @ turn) / 8 * codecs.int4_signs(64)
        # fp32 sums of 64 products in another order; a code that differed would be a fifteenth of the vector's extent.
        assert (codecs.vllm_int4(x) - theirs).abs().max() < 1e-5 * x.abs().max()


def test_an_evaluation_needs_no_vllm():
    code = "import sys, vllm_turboquant.evaluation; assert not [m for m in sys.modules if m.split('.')[0] == 'vllm']"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bytes_are_those_of_the_dtypes():
    known = {"auto": 512, "fp8": 256, "int4_per_token_head": 136} | dict(zip(VLLM, (196, 134, 118, 102), strict=True))
    known |= {"turboquant": 132, "turboquant-k4v3": 116, "turboquant-k3v3": 100, "turboquant-k2v2": 68}
    assert {name: Case(name).bytes_d128(28) for name in known} == known
    assert Case("turboquant_k8v4", skipped=4).bytes_d128(28) == pytest.approx(241.1, abs=0.1)
    assert Case("turboquant_k8v4", skipped=4).bytes_d128(3) == 512


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_keeps_shape_dtype_and_most_of_a_vector(vectors, name):
    key, value = torch.randn_like(vectors["key"]), vectors["value"]
    k, v = decoded(Case(name), key, value, 0, 1, None)
    assert k.shape == key.shape and v.shape == value.shape and k.dtype == v.dtype == torch.float32
    # Two bits of a Gaussian lose an eighth of its energy, and Algorithm 2's four a fifth; all others less.
    for ours, truth in ((k, key), (v, value)):
        assert (ours - truth).square().mean() < 0.25 * truth.square().mean()
    assert torch.equal(k, key) == (name == "auto")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("turboquant-k4v4-qjl",)])
def test_decoding_keeps_the_norm_that_a_codec_promises(vectors, name):
    """vLLM's "nc" keys have the true norm; our unbiased ones the true product with the vector."""
    key, value = vectors["key"], vectors["value"]
    k, _ = decoded(Case(name), key, value, 0, 1, None)
    # fp16's unit in the last place, of a norm or a scale.
    if name in VLLM[1:]:
        assert torch.allclose(k.norm(dim=-1), key.norm(dim=-1), rtol=2**-10)
    if name in PRESETS and name != "turboquant-k8v4":
        assert torch.allclose((k * key).sum(-1), key.square().sum(-1), rtol=2**-10)


def test_e4m3_saturates():
    assert codecs.e4m3(torch.tensor([[-1e4, 449.0, 1.06]])).tolist() == [[-448.0, 448.0, 1.0]]


def test_skipped_layers_are_bf16(vectors):
    key, value = vectors["key"], vectors["value"]
    case = Case("turboquant_3bit_nc", skipped=4)
    for layer in range(6):
        k, v = decoded(case, key, value, layer, 6, None)
        kept = layer in (0, 1, 4, 5)
        assert torch.equal(k, key.bfloat16().float()) == torch.equal(v, value.bfloat16().float()) == kept, layer


@pytest.mark.parametrize(
    "case, message",
    [
        ({"name": "turboquant-k9"}, "allowed are auto"),
        ({"name": "fp8", "calibrated": True}, "no calibration"),
        ({"name": "fp8", "skipped": 3}, "pairs"),
        ({"name": "turboquant", "window": -1}, "negative"),
    ],
)
def test_bad_cases_are_refused(case, message):
    with pytest.raises(ValueError, match=message):
        Case(**case)


def test_a_calibrated_case_needs_a_basis(vectors):
    with pytest.raises(ValueError, match="bases"):
        decoded(Case("turboquant", calibrated=True), vectors["key"], vectors["value"], 0, 1, None)
