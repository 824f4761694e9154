"""What a worker's layers keep in the KV cache; asked for by the status page through vLLM's ``collective_rpc``."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .kernels.format import FORMAT_VERSION

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class WorkerLayers:
    """Names of layers. kept: not compressed, and why. shared: compressed, in another layer's cache. based: whose keys are stored
    under a basis. fitted: whether those are calibrated, else they are key biases. fingerprint: of all bases. bytes, auto_bytes:
    of one token in all caches, the latter with dtype auto."""

    compressed: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    based: list[str] = field(default_factory=list)
    fitted: bool = False
    fingerprint: str | None = None
    bytes: float = 0
    auto_bytes: float = 0


def worker_layers(worker: Any, specs: dict[str, Any], fitted: bool) -> dict[str, Any]:
    """`WorkerLayers` of vLLM's Worker as plain values, as they travel between processes. specs: what its layers asked for."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.v1.kv_cache_interface import AttentionSpec

    from .summary import layers_of

    config: VllmConfig = worker.vllm_config
    layers: dict[str, Any] = config.compilation_config.static_forward_context
    compressed, kept = layers_of(config)
    found = WorkerLayers(compressed=compressed, fitted=fitted)
    found.kept = {name: reason for reason, names in kept.items() for name in names}
    found.kept |= {name: "a recurrent state, not keys and values" for name, x in layers.items() if isinstance(x, MambaBase)}
    found.shared = [name for name in compressed if layers[name].kv_sharing_target_layer_name is not None]
    bases = _bases({name: layers[name] for name in compressed if name not in found.shared})
    found.based, found.fingerprint = list(bases), _fingerprint(bases)
    for name, spec in specs.items():
        if isinstance(spec, AttentionSpec):
            stored = spec.page_size_bytes / spec.block_size
            plain = spec.num_kv_heads * (spec.head_size + spec.head_size_v) * config.model_config.dtype.itemsize
            found.bytes += stored
            found.auto_bytes += plain if name in compressed else stored
    return asdict(found)


def _bases(layers: dict[str, Any]) -> dict[str, Any]:
    """What each of these layers stores keys under, of those that have it."""
    from .impl import TurboQuantImpl

    impls = {name: getattr(layer, "impl", None) for name, layer in layers.items()}
    return {name: impl.basis for name, impl in impls.items() if isinstance(impl, TurboQuantImpl) and impl.basis is not None}


def _fingerprint(bases: dict[str, Any]) -> str | None:
    """Of every number that keys are stored under; None without any."""
    if not bases:
        return None
    digest = hashlib.sha256()
    for name in sorted(bases):
        digest.update(f"{name} {bases[name].bucket}\n".encode())
        for tensor in bases[name].tensors:
            digest.update(tensor.cpu().numpy().data)
    return digest.hexdigest()[:16]


def stored_as(config: VllmConfig) -> str:
    """What pages of this worker depend on beside dtype and shapes: equal on workers that can read each other's."""
    return f"format {FORMAT_VERSION}, keys {_fingerprint(_bases(config.compilation_config.static_forward_context))}"


def fingerprint_of_ranks(workers: list[WorkerLayers]) -> str | None:
    """One rank's own, of several the digest of all in their order."""
    prints = [worker.fingerprint or "" for worker in workers]
    if not any(prints):
        return None
    return prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest()[:16]


def merged(workers: list[WorkerLayers]) -> WorkerLayers:
    """Of all ranks: tensor-parallel ones have the same layers, pipeline stages different ones. Bytes add up."""
    whole = WorkerLayers()
    for worker in workers:
        for name in ("compressed", "shared", "based"):
            own: list[str] = getattr(whole, name)
            own.extend(layer for layer in getattr(worker, name) if layer not in own)
        whole.kept |= worker.kept
        whole.fitted |= worker.fitted
        whole.bytes += worker.bytes
        whole.auto_bytes += worker.auto_bytes
    return whole
