"""The recent window through our metadata builder and layer: what is kept exactly, for whom, and what attention makes of it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.attention import attend_raw
from vllm_turboquant.kernels.basis import KeyBasis, key_basis
from vllm_turboquant.kernels.format import PRESETS, RECENT_TOKENS

from ..kernels.recent_model import Row, Serving, as_tensors
from .conftest import EngineConfig
from .layers import Layer, build, specs

D, KV_HEADS, BLOCKS, SIZE = 32, 2, 24, 32


@dataclass
class Rig:
    """A configuration, its layers and their builder, over pages of `SIZE` tokens that are full of other bytes."""

    layers: dict[str, Any]
    builder: Any
    config: Any


@pytest.fixture
def rig(engine_config: EngineConfig, seed: int) -> Any:
    def make(preset: str, *layers: Layer, **options: Any) -> Rig:
        from vllm_turboquant.metadata import TurboQuantMetadataBuilder

        config = engine_config(kv_cache_dtype=preset, dtype="float32", **options)
        built = build(config, list(layers))
        g = torch.Generator().manual_seed(seed)
        for layer in built.values():
            shape = BLOCKS, KV_HEADS, SIZE, layer.impl.format.slot_bytes
            layer.kv_cache = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
        name, layer = next(iter(built.items()))
        spec = specs(config, {name: layer})[name]
        return Rig(built, TurboQuantMetadataBuilder(spec, list(built), config, torch.device("cpu")), config)

    return make


def batch_of(rows: list[Row], rng: random.Random) -> Any:
    table, seq_lens, starts, slots = as_tensors(rows, rng)
    positions = [p for row in rows for p in range(row.length - row.new, row.length)]
    tokens = len(positions)
    positions += [0] * (len(slots) - tokens)
    return SimpleNamespace(
        causal=True, num_reqs=len(seq_lens), num_actual_tokens=len(slots), query_start_loc=starts, seq_lens=seq_lens,
        block_table_tensor=table, slot_mapping=slots, positions=torch.tensor(positions, dtype=torch.int64),
    )  # fmt: skip


def vectors(ids: list[int], seed: int) -> torch.Tensor:
    """Keys and values of tokens by their number, fp32 ``[n, 2, Hk, d]``."""
    made = [torch.randn(2, KV_HEADS, D, generator=torch.Generator().manual_seed(seed + i)) for i in ids]
    return torch.stack(made) if made else torch.zeros(0, 2, KV_HEADS, D)


def random_basis(seed: int) -> KeyBasis:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(KV_HEADS, D, D, generator=g)
    means = torch.randn(KV_HEADS, 3, D, generator=g)
    return key_basis(root @ root.mT / D + torch.eye(D), means, torch.randn(KV_HEADS, D, generator=g) * 3, bucket=32)


@pytest.mark.parametrize("calibrated", (False, True))
@pytest.mark.parametrize("preset", ("turboquant-k2v2", "turboquant-k3v3"))
def test_newest_tokens_are_read_exactly(rig: Any, preset: str, calibrated: bool, seed: int) -> None:
    """Random serving: the oracle attends to raw vectors from ``ends`` on, to what codes give back before."""
    from vllm.forward_context import set_forward_context

    made = rig(preset, Layer(head_size=D), Layer(head_size=D, window=24), max_num_seqs=2 * Serving.RUNNING)
    for layer in made.layers.values():
        layer.impl.basis = random_basis(seed) if calibrated else None
    rng = random.Random(seed)
    serving = Serving(rng, BLOCKS, SIZE, max_query_len=1, everyone=False)
    exact = wanted = 0
    for _ in range(60):
        rows = serving.step()
        common = batch_of(rows, rng)
        if not common.num_actual_tokens:
            continue
        metadata = made.builder.build(0, common)
        ids = [i for row in rows for i in row.ids]
        if len(ids) != sum(row.new for row in rows):  # a dummy batch
            ids = []
        new = torch.zeros(common.num_actual_tokens, 2, KV_HEADS, D)
        new[: len(ids)] = vectors(ids, seed)
        query = torch.randn(
            common.num_actual_tokens, 2 * KV_HEADS, D, generator=torch.Generator().manual_seed(rng.randrange(2**31))
        )
        outs = {}
        for name, layer in made.layers.items():
            slots = {name: common.slot_mapping}
            with set_forward_context({name: metadata}, made.config, num_tokens=len(query), slot_mapping=slots):
                layer.impl.do_kv_cache_update(layer, new[:, 0], new[:, 1], layer.kv_cache, common.slot_mapping)
            out = torch.full((len(query), 2 * KV_HEADS * D), float("nan"))
            outs[name] = layer.impl.forward(layer, query, new[:, 0], new[:, 1], layer.kv_cache, metadata, out).view(query.shape)
        start = 0
        for row, end in zip(rows, metadata.recent.ends.tolist(), strict=False):
            start += row.new
            if row.request is None or not ids:
                continue
            if row.new == 1:
                exact, wanted = exact + row.length - end, wanted + min(row.length, RECENT_TOKENS)
            raw = vectors([row.request.ids[p] for p in range(row.length)], seed)
            for name, layer in made.layers.items():
                key, value = reference.load_vectors(
                    layer.kv_cache,
                    torch.tensor(row.table),
                    layer.impl.format,
                    layer.impl.basis,
                    torch.arange(len(row.table)) * SIZE,
                )
                key, value = (torch.cat([x[:end], raw[end:, i].double()]) for i, x in enumerate((key, value)))
                full = torch.zeros(row.length, 2 * KV_HEADS, D, dtype=torch.float64)
                full[row.length - row.new :] = query[start - row.new : start]
                truth = attend_raw(
                    full, key[: row.length], value[: row.length], layer.impl.scale, window=layer.impl.sliding_window
                )
                ours = outs[name][start - row.new : start].double()
                # Pools and outputs are fp32; the mean that kept keys are relative to is as long as they are.
                torch.testing.assert_close(ours, truth[row.length - row.new :], rtol=1e-4, atol=1e-5)
    assert exact > wanted / 4 > 0, f"{exact} of {wanted} tokens exact"


def test_who_has_a_window() -> None:
    assert {name for name, preset in PRESETS.items() if preset.recent} == {"turboquant-k3v3", "turboquant-k2v2"}


def test_pools_are_bounded(rig: Any) -> None:
    from vllm_turboquant.recent import MAX_REQUESTS

    few, many = (rig("turboquant-k3v3", Layer(head_size=D), max_num_seqs=n) for n in (3, 4 * MAX_REQUESTS))
    pools = [next(iter(made.layers.values())).impl.recent for made in (few, many)]
    # 64 tokens lie in five units of 16 at most.
    assert [pool.key.shape for pool in pools] == [(5 * n, 16, KV_HEADS, D) for n in (3, MAX_REQUESTS)]
    assert next(iter(rig("turboquant", Layer(head_size=D)).layers.values())).impl.recent is None


def test_where_it_cannot_be(rig: Any) -> None:
    from vllm_turboquant.recent import obstacle

    made = rig("turboquant-k3v3", Layer(head_size=D))
    assert obstacle(made.config) is None
    made.config.speculative_config = SimpleNamespace(method="ngram", num_speculative_tokens=3)
    assert obstacle(made.config) is None
    made.config.speculative_config = SimpleNamespace(method="eagle", num_speculative_tokens=3)
    assert "eagle" in str(obstacle(made.config))
    made.config.speculative_config = None
    made.config.kv_transfer_config = SimpleNamespace()
    assert "KV connector" in str(obstacle(made.config))
