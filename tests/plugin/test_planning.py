"""Bytes and tokens, as vLLM's planner counts them: every page is exactly what the preset promises, and nothing is padded."""

from __future__ import annotations

import random
from typing import Any

import pytest

from .conftest import EngineConfig
from .facts import HEAD_SIZES, KV_HEADS, PRESETS, slot_bytes
from .layers import Layer, build, plan, planned_specs, specs

MIB = 1 << 20


@pytest.mark.parametrize("preset", PRESETS)
def test_every_head_size_and_kv_head_count(preset: str, engine_config: EngineConfig, seed: int) -> None:
    rng = random.Random(seed)
    for head_size in HEAD_SIZES:
        for kv_heads in KV_HEADS:
            block = rng.choice((16, 32, 64, 128))
            config = engine_config(kv_cache_dtype=preset, block_size=block)
            count = rng.randint(1, 5)
            wanted = specs(config, build(config, [Layer(head_size, kv_heads)] * count))
            page = block * kv_heads * slot_bytes(preset, head_size)
            assert page % 16 == 0
            assert {spec.page_size_bytes for spec in wanted.values()} == {page}, (head_size, kv_heads)
            blocks = 8192 // block + rng.randint(2, 500)
            planned = plan(config, wanted, blocks * count * page + rng.randrange(page))
            assert planned.num_blocks == blocks, (head_size, kv_heads, block, count)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_sliding_window_layers_are_compressed_too(preset: str, head_size: int, engine_config: EngineConfig) -> None:
    config = engine_config(kv_cache_dtype=preset, block_size=16)
    layers = [Layer(head_size, 4, window=64)] * 5 + [Layer(head_size, 4)]
    wanted = specs(config, build(config, layers))
    kinds = {type(spec).__name__ for spec in wanted.values()}
    assert kinds == {"SlidingWindowSpec", "FullAttentionSpec"}
    for spec in planned_specs(plan(config, wanted, 256 * MIB)).values():
        assert spec.page_size_bytes == spec.block_size * 4 * slot_bytes(preset, head_size)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sizes", [(256, 512), (64, 128)])
@pytest.mark.parametrize("kv_heads", [(4, 2), (8, 1), (2, 2), (1, 8)])
def test_mixed_head_sizes_pad_nothing(
    preset: str, sizes: tuple[int, int], kv_heads: tuple[int, int], engine_config: EngineConfig
) -> None:
    """Gemma 4's shape. Pages divide each other, so vLLM's planner multiplies block sizes and never pads."""
    config = engine_config(kv_cache_dtype=preset, block_size=16)
    small, large = (Layer(sizes[0], kv_heads[0], window=64), Layer(sizes[1], kv_heads[1]))
    wanted = specs(config, build(config, [small, small, large] * 2))
    groups = {size: size // min(128, sizes[0]) for size in sizes}
    for name, spec in planned_specs(plan(config, wanted, 256 * MIB)).items():
        layer = wanted[name]
        promised = layer.num_kv_heads * slot_bytes(preset, layer.head_size, groups[layer.head_size])
        assert layer.page_size_bytes == 16 * promised
        assert spec.page_size_bytes == spec.block_size * promised, f"{name} is padded"


@pytest.mark.parametrize("preset", PRESETS)
def test_tokens_times_bytes_is_the_memory(preset: str, engine_config: EngineConfig, seed: int) -> None:
    """The capacity that vLLM logs, against the bytes it allocates. 1%: less than one block in a hundred is left over."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    rng = random.Random(seed)
    layers = [Layer(rng.choice((64, 96, 128, 256)), rng.choice(KV_HEADS))] * rng.randint(2, 6)
    config = engine_config(kv_cache_dtype=preset, block_size=16)
    planned = plan(config, specs(config, build(config, layers)), 256 * MIB + rng.randrange(MIB))
    tokens, _ = get_kv_cache_capacity(config, planned)
    token_bytes = sum(layer.kv_heads * slot_bytes(preset, layer.head_size) for layer in layers)
    assert sum(tensor.size for tensor in planned.kv_cache_tensors) <= 257 * MIB
    assert tokens * token_bytes == pytest.approx(planned.kv_cache_tensors[0].size, rel=0.01)
    assert tokens * token_bytes == pytest.approx(256 * MIB, rel=0.01)


def test_skipped_layers_are_counted_at_their_own_size(engine_config: EngineConfig) -> None:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    config = engine_config(block_size=16, kv_cache_dtype_skip_layers=["0", "3"])
    wanted = specs(config, build(config, [Layer()] * 6))
    token_bytes = [spec.page_size_bytes // 16 for spec in wanted.values()]
    assert token_bytes == [1024, 264, 264, 1024, 264, 264]  # 2 heads of 128 dims: bf16 K and V, or 132 bytes a head
    planned = plan(config, wanted, 256 * MIB)
    tokens, _ = get_kv_cache_capacity(config, planned)
    assert tokens * sum(token_bytes) == pytest.approx(256 * MIB, rel=0.01)


def test_longest_admitted_request_is_what_fits(engine_config: EngineConfig) -> None:
    """vLLM's own check counts compressed bytes: the last token that fits is admitted, one more is refused."""
    block_bytes = 6 * 16 * 2 * 132
    for length, fits in ((16 * 300, True), (16 * 300 + 1, False)):
        config = engine_config(block_size=16, max_model_len=length)
        wanted = specs(config, build(config, [Layer()] * 6))
        if fits:
            assert plan(config, wanted, 301 * block_bytes).num_blocks == 301  # vLLM keeps one block for itself
        else:
            with pytest.raises(ValueError, match="KV cache"):
                plan(config, wanted, 301 * block_bytes)


def _hybrid(config: Any, layer: Layer, state_bytes: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], int]:
    """Specs of two attention layers and six state layers of ``state_bytes``, after vLLM aligned their pages."""
    import torch
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MambaSpec

    class StateModel:
        @staticmethod
        def get_mamba_state_shape_from_config(config: Any) -> tuple[tuple[int, ...], ...]:
            return ((state_bytes // 4,),)

        @staticmethod
        def get_mamba_state_dtype_from_config(config: Any) -> tuple[torch.dtype, ...]:
            return (torch.float32,)

    monkeypatch.setattr(ModelRegistry, "resolve_model_cls", lambda *args, **kwargs: (StateModel, ""))
    built = build(config, [layer] * 2)
    current_platform._align_hybrid_block_size(config, next(iter(built.values())).get_attn_backend())
    wanted = specs(config, built)
    state = MambaSpec(
        shapes=((state_bytes // 4,),),
        dtypes=(torch.float32,),
        block_size=config.cache_config.mamba_block_size or 8192,
        page_size_padded=config.cache_config.mamba_page_size_padded,
    )
    return {**wanted, **{f"state.{index}": state for index in range(6)}}, state.page_size_bytes - state_bytes


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("block", [16, 128])
def test_hybrid_pages_unify_with_little_padding(
    preset: str, block: int, engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """State pages of 0.5 to 13 MiB: vLLM rounds the attention block up to a multiple of ``block`` tokens, so the state
    page is padded by less than ``block`` tokens, and no attention page is padded at all."""
    rng = random.Random(seed)
    for head_size in (64, 128, 256):
        for kv_heads in KV_HEADS:
            state_bytes = 4 * rng.randint(MIB // 8, 13 * MIB // 4)
            config = engine_config("hybrid", kv_cache_dtype=preset, block_size=block, enable_prefix_caching=False)
            config.model_config.model_arch_config.head_size = head_size
            config.model_config.model_arch_config.total_num_kv_heads = kv_heads
            wanted, padding = _hybrid(config, Layer(head_size, kv_heads), state_bytes, monkeypatch)
            token_bytes = kv_heads * slot_bytes(preset, head_size)
            assert 0 <= padding < block * token_bytes, (head_size, kv_heads, state_bytes)
            planned = planned_specs(plan(config, wanted, 4096 * MIB))
            assert len({spec.page_size_bytes for spec in planned.values()}) == 1
            for name, spec in planned.items():
                if not name.startswith("state"):
                    assert spec.page_size_bytes == spec.block_size * token_bytes, f"{name} is padded"


# Head size, KV heads and bytes of a state of models that people serve, by their configurations: convolution in bf16, the rest in
# float32, or bf16 as well in Jamba.
HYBRIDS = {
    "Qwen3-Next-80B": (256, 2, 2 * 3 * 8192 + 4 * 32 * 128 * 128),
    "Nemotron-H-8B": (128, 8, 2 * 3 * 10240 + 4 * 128 * 64 * 128),
    "Jamba-Mini": (128, 8, 2 * 3 * 8192 + 2 * 8192 * 16),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", HYBRIDS)
def test_padding_of_hybrids(model: str, preset: str, engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least there can be in blocks of the 16 tokens that kernels read at once, below 3% of a state where those are less.

    A state of Jamba takes the bytes of 300 tokens, so that 16 of them are 5%; what that wastes of a request's memory is less, as
    a request of any length has one state a layer.
    """
    head_size, kv_heads, state_bytes = HYBRIDS[model]
    config = engine_config("hybrid", kv_cache_dtype=preset, block_size=16, enable_prefix_caching=False)
    config.model_config.model_arch_config.head_size = head_size
    config.model_config.model_arch_config.total_num_kv_heads = kv_heads
    _, padding = _hybrid(config, Layer(head_size, kv_heads), state_bytes, monkeypatch)
    print(f"{model}, {preset}: blocks of {config.cache_config.block_size} tokens, {padding / state_bytes:.2%} of a state padded")
    unit = 16 * kv_heads * slot_bytes(preset, head_size)
    assert padding == -state_bytes % unit
    if unit < 0.03 * state_bytes:
        assert padding < 0.03 * state_bytes
    if (model, preset) == ("Jamba-Mini", "turboquant"):
        assert f"{padding / state_bytes:.1%}" == "3.1%"  # as README says
