"""Patches of vLLM's workers, G, I and K of ``compat``'s table: applied when the first layer of ours is built."""

from __future__ import annotations

import functools
from typing import Any

from . import connectors
from .config import FLAG, refuse
from .supported import SUPPORTED


def follow_workers() -> None:
    """Patches G and I, which every executor calls at start. The wrapper hands what it lacks to the worker, of whichever class."""
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    wrapper: Any = WorkerWrapperBase
    if hasattr(wrapper, "turboquant_calibration"):
        return
    if (
        "get_kv_cache_spec" in vars(wrapper)
        or "initialize_from_config" not in vars(wrapper)
        or not hasattr(wrapper, "__getattr__")
        or not hasattr(WorkerBase, "get_kv_cache_spec")
    ):
        raise refuse(FLAG, "turboquant", "this vLLM's WorkerWrapperBase has changed", f"install vLLM {' or '.join(SUPPORTED)}")
    original = wrapper.initialize_from_config

    def get_kv_cache_spec(self: Any) -> Any:
        from .calibration import calibrate_worker
        from .pages import fit, unaligned

        if "turboquant_calibration_file" not in vars(self):  # once a worker
            self.turboquant_calibration_file, self.turboquant_keys = calibrate_worker(self.worker)
        self.turboquant_specs = unaligned(self.worker.get_kv_cache_spec(), self.vllm_config)
        return fit(self.turboquant_specs, self.vllm_config)

    @functools.wraps(original)
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        from .summary import report

        if "turboquant_specs" in vars(self):
            _tell_calibrations_apart(self.vllm_config)
        original(self, kv_cache_configs)
        if "turboquant_specs" in vars(self):
            report(self.vllm_config, kv_cache_configs[self.global_rank], self.turboquant_specs, self.turboquant_keys)

    def turboquant_calibration(self: Any) -> str | None:
        path = self.turboquant_calibration_file
        return None if path is None else str(path)

    wrapper.get_kv_cache_spec = get_kv_cache_spec
    wrapper.initialize_from_config = initialize_from_config

    def turboquant_layers(self: Any) -> dict[str, Any]:
        from .endpoint_layers import worker_layers

        return worker_layers(self.worker, self.turboquant_specs, fitted=self.turboquant_calibration_file is not None)

    wrapper.turboquant_calibration = turboquant_calibration
    wrapper.turboquant_layers = turboquant_layers


def _tell_calibrations_apart(vllm_config: Any) -> None:
    """Patch K, before NIXL registers pages: its handshake compares dtype and shapes, not what keys are stored under."""
    if not any("nixl" in name.lower() for name in connectors.names(vllm_config.kv_transfer_config)):
        return
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker

    from .endpoint_layers import stored_as

    original = base_worker.compute_nixl_compatibility_hash
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def compute_nixl_compatibility_hash(config: Any, backend: str, *args: Any, **kwargs: Any) -> str:
        return original(config, f"{backend}, {stored_as(config)}", *args, **kwargs)

    base_worker.compute_nixl_compatibility_hash = compute_nixl_compatibility_hash
