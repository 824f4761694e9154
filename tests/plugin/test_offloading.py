"""Native offloading over our pages: vLLM's own registration says where a block lies, and those bytes come back. NIXL's handshake.

vLLM offloads from GPUs only. What it does there with a registration is a list of pointers and sizes, copied here by hand.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.format import page_format

from .conftest import EngineConfig
from .layers import Layer, build, plan, planned_specs, specs, views
from .test_calibration import random_basis

CHUNK = 2  # blocks that are offloaded as one
POISON = 0x5A
SHAPES: dict[str, tuple[list[Layer], dict[str, Any]]] = {
    "full attention": ([Layer()] * 3, {}),
    "windows": ([Layer(window=64), Layer(window=64), Layer()] * 2, {}),
    "mixed head sizes": ([Layer(64, 4, window=64), Layer(64, 4, window=64), Layer(128, 2)] * 2, {}),
    "skipped layers": ([Layer()] * 4, {"kv_cache_dtype_skip_layers": ["0", "3"]}),
}


class Offloading:
    """vLLM's worker of the connector, and host memory of as many chunks as it is asked to keep."""

    def __init__(self, config: Any, planned: Any, caches: dict[str, torch.Tensor], chunks: int) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker

        one_rank = SimpleNamespace(canonical_layout=False, parallel=SimpleNamespace(rank=0))
        spec: Any = SimpleNamespace(replicated_layout=False, config=one_rank, get_worker=self._take)
        OffloadingConnectorWorker(spec, config, planned).register_kv_caches(caches)
        sizes = [tensor.tensor.shape[1] * CHUNK for tensor in self.registered.tensors]
        self.host = [torch.zeros(chunks, size, dtype=torch.int8) for size in sizes]

    def _take(self, registered: Any) -> None:
        self.registered = registered

    def copy(self, group: int, blocks: list[int], chunks: list[int], out: bool) -> None:
        """``blocks`` of the cache, two a chunk, to or from ``chunks`` of host memory."""
        from vllm.v1.kv_offload.cpu.gpu_worker import compute_sub_block_ptrs

        for ref in self.registered.group_data_refs[group]:
            device, host = (np.empty(len(blocks), dtype=np.uint64) for _ in range(2))
            compute_sub_block_ptrs(np.array(blocks), 1, device, self.registered.tensors[ref.tensor_idx].tensor)
            compute_sub_block_ptrs(np.array(chunks), CHUNK, host, self.host[ref.tensor_idx])
            for ours, theirs in zip(device.tolist(), host.tolist(), strict=True):
                ctypes.memmove(*((theirs, ours) if out else (ours, theirs)), ref.page_size_bytes)


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", ["turboquant", "turboquant-k3v3"])
def test_blocks_come_back_elsewhere(preset: str, shape: str, layout: str, engine_config: EngineConfig, seed: int) -> None:
    """Blocks of a group are stored, offloaded, lost and loaded into other blocks: the same bytes, and no byte beside them."""
    from vllm_turboquant.pages import fit

    layers, options = SHAPES[shape]
    config = engine_config(kv_cache_dtype=preset, block_size=16, max_model_len=128, kv_offloading_size=1.0, **options)
    planned = plan(config, fit(specs(config, build(config, layers)), config), 1 << 20, layout)
    raw = torch.full((planned.kv_cache_tensors[0].size,), POISON, dtype=torch.int8)
    caches = views(planned, raw, layout)
    offloading = Offloading(config, planned, caches, chunks=4)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(planned.num_blocks, generator=generator).tolist()
    old, new = order[:4], order[4:8]
    for index, group in enumerate(planned.kv_cache_groups):
        raw.fill_(POISON)
        before: dict[str, torch.Tensor] = {}
        for name in group.layer_names:
            spec, view = planned_specs(planned)[name], caches[name]
            if spec.state_content_bytes is None:  # skipped: vLLM's own page
                view[old] = torch.randint(0, 100, view[old].shape, generator=generator).to(view.dtype)
            else:
                slots = torch.cat([torch.arange(spec.block_size) + block * spec.block_size for block in old])
                sides = (torch.randn(len(slots), spec.num_kv_heads, spec.head_size, generator=generator) for _ in range(2))
                size = 64 if shape.startswith("mixed") else spec.head_size  # dims of a scale: those of the smallest head
                reference.store(*sides, view, slots, page_format(preset, spec.head_size, min(128, size)))
            before[name] = view[old].clone()
        offloading.copy(index, old, [3, 1], out=True)
        raw.fill_(POISON)
        offloading.copy(index, new, [3, 1], out=False)
        rest = sorted(set(range(planned.num_blocks)) - set(new))
        for name, kept in before.items():
            assert torch.equal(caches[name][new].view(torch.uint8), kept.view(torch.uint8)), name
            assert bool((caches[name][rest].view(torch.uint8) == POISON).all()), f"{name}: other blocks were written"


def test_nixl_tells_calibrations_apart(engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """By the hash that its workers compare before one reads the other's pages."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker

    from vllm_turboquant.compat_workers import _tell_calibrations_apart

    name = "compute_nixl_compatibility_hash"
    original = getattr(base_worker, name)
    monkeypatch.setattr(base_worker, name, original)  # to be put back at the end
    off = {"additional_config": {"turboquant": {"calibration": "off"}}}
    plain = engine_config(**off)
    _tell_calibrations_apart(plain)
    assert getattr(base_worker, name) is original
    nixl = off | {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}
    generator = torch.Generator().manual_seed(seed)
    one, other = (random_basis(2, 128, generator) for _ in range(2))

    def compared(basis: Any, **options: Any) -> str:
        config = engine_config(**nixl, **options)
        for layer in build(config, [Layer()] * 2).values():
            layer.impl.basis = basis
        _tell_calibrations_apart(config)
        return str(getattr(base_worker, name)(config, "TURBOQUANT"))

    assert compared(one) == compared(one)
    assert len({compared(one), compared(other), compared(None), compared(one, kv_cache_dtype="turboquant-k8v4")}) == 4
