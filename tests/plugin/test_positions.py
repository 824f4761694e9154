"""How a layer whose keys are stored by position learns the positions of what it stores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.basis import key_basis

from .conftest import EngineConfig
from .layers import Layer, build, specs

D = 32


@pytest.fixture
def layer(engine_config: EngineConfig, seed: int) -> tuple[Any, str, Any]:
    """A configuration, its only layer's name, and the layer, under a basis of two buckets far apart."""
    config = engine_config()
    ((name, layer),) = build(config, [Layer(head_size=D)]).items()
    means = torch.randn(2, 2, D, generator=torch.Generator().manual_seed(seed)) * 100
    layer.impl.basis = key_basis(torch.eye(D).expand(2, D, D), means, bucket=32)
    return config, name, layer


def batch(positions: torch.Tensor | None) -> Any:
    """Two requests of 20 tokens, one of which is a continuation from position 22 on; metadata as far as our builder reads it."""
    return SimpleNamespace(
        causal=True, num_reqs=2, num_actual_tokens=40, query_start_loc=torch.tensor([0, 20, 40]), seq_lens=torch.tensor([20, 42]),
        block_table_tensor=torch.zeros(2, 4), slot_mapping=torch.arange(40), positions=positions,
    )  # fmt: skip


def test_positions_reach_the_cache_update(layer: tuple[Any, str, Any], seed: int) -> None:
    from vllm.forward_context import set_forward_context

    from vllm_turboquant.metadata import TurboQuantMetadataBuilder

    config, name, module = layer
    impl, basis = module.impl, module.impl.basis
    positions = torch.cat([torch.arange(20), torch.arange(22, 42)])
    builder = TurboQuantMetadataBuilder(specs(config, {name: module})[name], [name], config, torch.device("cpu"))
    metadata = builder.build(0, batch(positions))
    key = torch.randn(48, 2, D, generator=torch.Generator().manual_seed(seed)) + basis.means[:, 0]
    key[30:] += basis.means[:, 1] - basis.means[:, 0]  # from position 32 on
    ours, truth = (torch.zeros(4, 2, 16, impl.format.slot_bytes, dtype=torch.uint8) for _ in range(2))
    slots = torch.cat([torch.arange(40), torch.full((8,), -1)])  # padded further than the metadata is
    with set_forward_context({name: metadata}, config, num_tokens=48, slot_mapping={name: slots}):
        impl.do_kv_cache_update(module, key, key, ours, slots)
    reference.store(key, key, truth, slots[:40], impl.format, basis, positions)
    assert torch.equal(ours, truth)
    # A run without metadata has nothing to store.
    with set_forward_context(None, config, num_tokens=48, slot_mapping={name: slots}):
        impl.do_kv_cache_update(module, key, key, ours, torch.full((48,), -1))
    assert torch.equal(ours, truth)


@pytest.mark.parametrize("positions", [None, torch.zeros(3, 40, dtype=torch.int64)])
def test_a_batch_without_positions_is_refused(layer: tuple[Any, str, Any], positions: torch.Tensor | None) -> None:
    from vllm_turboquant.config import TurboQuantError
    from vllm_turboquant.metadata import TurboQuantMetadataBuilder

    config, name, module = layer
    spec = specs(config, {name: module})[name]
    with pytest.raises(TurboQuantError, match="without its tokens' positions"):
        TurboQuantMetadataBuilder(spec, [name], config, torch.device("cpu")).build(0, batch(positions))
    module.impl.basis = None
    assert TurboQuantMetadataBuilder(spec, [name], config, torch.device("cpu")).build(0, batch(None)).positions is None
