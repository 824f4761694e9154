"""Rotary modules as matrices, and the key bias that weights tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.attention import attend_raw
from vllm_turboquant.kernels.format import page_format
from vllm_turboquant.rotary import mean_turn, turns

from .conftest import EngineConfig

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
    "mrope": {"rope_parameters": {"mrope_section": [8, 12, 12]}},  # Qwen2-VL's, whose text tokens have one position
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


def qwen2_attention(config: Any, norm: bool = False, layer: int = 0) -> Any:
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
            prefix=f"model.layers.{layer}.self_attn",
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
