"""The views that vLLM makes of its memory, and the codec on them: only the bytes of stored tokens change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.format import UNIT_TOKENS, PageFormat, page_format
from vllm_turboquant.kernels.rotation import ROTATION_SEED, rotation

from .conftest import EngineConfig
from .facts import HEAD_SIZES, KV_HEADS, PRESETS, slot_bytes
from .layers import Layer, build, plan, specs, views

# Relative squared error of a side, three times what the codec is held to elsewhere (tests/kernels): a few vectors
# scatter, while a byte in a wrong place costs more than 1.
BOUNDS = {1: 0.0, 2: 0.39, 3: 0.101, 4: 0.026, 8: 0.003, 32: 1e-12}
SKETCH_BOUND = 0.25  # Algorithm 2 trades error for lack of bias: five to six times a 3-bit code's


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small, and threads that wait for each other on a busy machine take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _error(decoded: torch.Tensor, original: torch.Tensor) -> float:
    matrix = rotation(original.shape[-1], ROTATION_SEED).to(torch.float64)
    expected = original.to(torch.float64) @ matrix.T
    return float((decoded - expected).square().sum() / expected.square().sum())


def _own_bytes(view: torch.Tensor, slots: torch.Tensor, fmt: PageFormat) -> None:
    """Marks with 1 every byte that ``slots`` own, by the format's table, in a view of a mask buffer."""
    block_tokens = view.shape[2]
    table = torch.tensor(fmt.token_bytes_table)
    for slot in slots.tolist():
        block, token = divmod(slot, block_tokens)
        start = token // UNIT_TOKENS * fmt.unit_bytes
        for head in range(view.shape[1]):
            view[block, head].view(-1)[start + table[token % UNIT_TOKENS]] = 1


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("preset", PRESETS)
def test_store_and_load_on_vllm_views(preset: str, layout: str, engine_config: EngineConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for index, head_size in enumerate(HEAD_SIZES):
        fmt = page_format(preset, head_size)
        kv_heads = KV_HEADS[(index + seed) % len(KV_HEADS)]  # every pair is reached over a few runs
        block = (16, 32, 48)[(index // 4 + seed) % 3]
        config = engine_config(kv_cache_dtype=preset, block_size=block, max_model_len=block * 4)
        wanted = specs(config, build(config, [Layer(head_size, kv_heads)] * 3))
        page = block * kv_heads * slot_bytes(preset, head_size)
        planned = plan(config, wanted, 6 * 3 * page, layout)
        raw = torch.full((6 * 3 * page,), -1, dtype=torch.int8)
        mask = torch.zeros_like(raw)
        made, marks = views(planned, raw, layout), views(planned, mask, layout)
        for view in made.values():
            assert view.shape == (6, kv_heads, block, slot_bytes(preset, head_size))
            assert view.dtype == torch.uint8
            assert view.stride()[2:] == (view.shape[3], 1), "a head's tokens are not side by side"
            assert view.data_ptr() % 4 == 0
            assert view.stride(0) % 16 == 0 and view.stride(1) % 16 == 0

        name = sorted(made)[index % 3]
        slots = torch.randperm(6 * block, generator=generator)[:13]
        key, value = (torch.randn(len(slots), kv_heads, head_size, generator=generator) for _ in range(2))
        reference.store(key, value, made[name], slots, fmt)
        _own_bytes(marks[name], slots, fmt)
        assert int(mask.sum()) == len(slots) * kv_heads * fmt.slot_bytes
        assert bool((raw[mask == 0] == -1).all()), f"head size {head_size}: bytes beside the stored tokens changed"

        loaded = reference.load(made[name], torch.arange(6), fmt)
        for side, original, codec in zip(loaded, (key, value), (fmt.preset.key, fmt.preset.value), strict=True):
            bound = SKETCH_BOUND if codec.sketch else BOUNDS[codec.bits]
            assert _error(side[slots], original) < bound, (head_size, kv_heads, codec)
