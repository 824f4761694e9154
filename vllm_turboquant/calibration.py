"""The key basis of every compressed layer, chosen once per start: after weights are loaded, before the KV cache is sized.

With calibration, keys and queries of a run over text are rotated to positions over the whole served length before their
moments are taken: a transform that knows the first positions only is worse than none far beyond them.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group, get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from .calibration_file import CalibrationFileError, Identity, configured_identity, fingerprint, load, mismatch, save
from .calibration_run import RECIPE, run_model
from .config import AUTO, OFF, TurboQuantSettings, refuse_calibration_file
from .impl import TurboQuantImpl, shared_layers
from .kernels import private
from .kernels.basis import KeyBasis
from .key_bias import bias_bases
from .key_noise import keep_exact, noisy_layers

logger = init_logger("vllm.turboquant")
Bases = Mapping[str, KeyBasis]
UNCALIBRATED = "TurboQuant: keys are stored without calibration: %s."


def calibrate_worker(worker: Any) -> tuple[Path | None, str]:
    """Sets ``basis`` of the model's compressed layers; returns the calibration file that it was read from or written to, and in
    words what is done to keys.

    worker: vLLM's Worker, its model loaded. Collective: all ranks call it. Raises TurboQuantError where a file that the user
    named does not fit the weights.
    """
    config: VllmConfig = worker.vllm_config
    model: torch.nn.Module = worker.model_runner.get_model()
    modules = {id(module) for module in model.modules()}
    context: dict[str, Any] = config.compilation_config.static_forward_context
    attention = {name: layer for name, layer in context.items() if isinstance(layer, AttentionLayerBase) and id(layer) in modules}
    # A drafter's layers too where they read the model's own cache.
    shared = shared_layers(config)
    read = {name: layer for name, layer in context.items() if name in attention or shared.get(name) in attention}
    layers = {name: layer for name, layer in read.items() if _coded(getattr(layer, "impl", None))}
    if not layers:
        return None, "keys exact"
    setting = TurboQuantSettings.from_additional_config(config.additional_config).calibration
    path: Path | None = None
    bases: Bases | None = None
    keys = "calibration off"
    if setting != OFF:
        path, bases, keys = _calibration(setting, config, model, attention, layers, worker.device)
    if bases is None:
        path, bases = None, _from_weights(config, model, layers)
        keys += f", key bias subtracted in {len(bases)} layers" if bases else ""
        noisy = noisy_layers(model, {name: layer for name, layer in owners(layers).items() if name not in bases})
        if noisy:
            _log("TurboQuant: %s", keep_exact(noisy, layers, config), warn=True)
            layers = {name: layer for name, layer in layers.items() if _coded(layer.impl)}
    _set(layers, bases, worker)
    return path, keys


def _coded(impl: object) -> bool:
    """Whether keys of the layer lose anything: those of the lossless debug format do not."""
    return isinstance(impl, TurboQuantImpl) and impl.format.preset.key.bits < 32


def _from_weights(config: VllmConfig, model: torch.nn.Module, layers: Mapping[str, Any]) -> Bases:
    """The weights-only mean, with one line that counts the layers."""
    blind = {
        name: layer
        for name, layer in owners(layers).items()
        if centred(name, layers) and not isinstance(layer, ChunkedLocalAttention)  # means, too, are stored by position
    }
    bases = bias_bases(model, blind, config.model_config.max_model_len)
    if bases:
        _log("TurboQuant: key bias of %d of %d layers subtracted from stored keys.", len(bases), len(owners(layers)))
    return bases


def _set(layers: Mapping[str, Any], bases: Bases, worker: Any) -> None:
    placed = {name: basis.to(worker.device) for name, basis in bases.items()}
    for name, layer in layers.items():
        layer.impl.basis = placed.get(layer.kv_sharing_target_layer_name or name)
    if worker.device.type == "cuda":
        # What vLLM measured while it loaded the weights does not have them; they come out of the KV cache's share too.
        own = {id(layer.impl.basis): layer.impl.basis for layer in layers.values() if layer.impl.basis is not None}
        parts = [part for basis in own.values() for part in basis.tensors]
        worker.model_runner.model_memory_usage += sum(part.nbytes for part in parts)


def owners(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers with a cache of their own."""
    return {name: layer for name, layer in layers.items() if layer.kv_sharing_target_layer_name is None}


def centred(name: str, layers: Mapping[str, Any]) -> bool:
    """Whether a constant in all logits of a query goes unseen by all layers that read the keys of layer ``name``."""
    readers = (layer.impl for key, layer in layers.items() if name in (key, layer.kv_sharing_target_layer_name))
    return not any(impl.logits_soft_cap or impl.sinks is not None for impl in readers)


def undriveable(config: VllmConfig, model: torch.nn.Module, attention: Mapping[str, Any]) -> str | None:
    """Why the model cannot be run on its own before it has a KV cache; None where it can."""
    if config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline parallelism is not handled"
    if config.model_config.is_multimodal_model:
        return "multimodal models are not handled"
    if config.lora_config is not None:
        return "models that serve LoRA adapters are not handled"
    given = {"input_ids", "positions", "intermediate_tensors", "inputs_embeds"}
    parameters = inspect.signature(model.forward).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in given]
    if wanted:
        return f"the model wants {', '.join(wanted)}"
    for name, layer in attention.items():
        if not isinstance(layer, Attention):
            return f"layer {name} ({type(layer).__name__}) keeps a state that does not exist yet"
        if layer.attn_type != AttentionType.DECODER or getattr(layer.impl, "alibi_slopes", None) is not None:
            return f"attention of layer {name} is not plainly causal"
    return None


def _calibration(
    setting: str,
    config: VllmConfig,
    model: torch.nn.Module,
    attention: Mapping[str, Any],
    layers: Mapping[str, Any],
    device: torch.device,
) -> tuple[Path | None, Bases | None, str]:
    """From a file, or by running the model; None where neither can be. And what was done, in words."""
    for name, layer in layers.items():
        if isinstance(layer, ChunkedLocalAttention):
            reason: str | None = f"layer {name} attends within chunks, whose batches come without positions"
            if setting != AUTO:
                raise refuse_calibration_file(Path(setting), f"cannot be used, as {reason}")
            _log(UNCALIBRATED, reason, warn=True)
            return None, None, f"not calibrated: {reason}"
    identity = _identity(config, model, owners(layers))
    path = Path(setting) if setting != AUTO else cache_folder() / identity.file_name()
    bases, problem = _load(path, identity, kept=setting == AUTO)
    if _everywhere(bases is not None):
        _log("TurboQuant: calibration of %d layers loaded from %s.", len(identity.layers), path)
        return path, bases, f"calibrated by {path.name}"
    if setting != AUTO:
        raise refuse_calibration_file(path, problem or "does not fit the weights of another rank")
    if problem and path.exists():
        _log("TurboQuant: %s %s; calibrating again.", path, problem)
    reason = undriveable(config, model, attention)
    if reason is None:
        bases, reason = _run(config, model, attention, layers, device, lambda own: _store(path, identity, own))
    if reason is not None:
        _log(UNCALIBRATED, reason, warn=True)
        return None, None, f"not calibrated: {reason}"
    return path, bases, f"calibrated by {path.name}"


def _run(
    config: VllmConfig,
    model: torch.nn.Module,
    attention: Mapping[str, Any],
    layers: Mapping[str, Any],
    device: torch.device,
    store: Callable[[Bases], str],
) -> tuple[Bases | None, str | None]:
    started = time.monotonic()
    _log("TurboQuant: calibrating keys of %d layers, once per model ...", len(owners(layers)))
    own: dict[str, KeyBasis] = {}
    try:
        statistics = run_model(config, model, attention, set(owners(layers)), device)
        for name, one in statistics.items():
            own[name] = one.basis(centred=centred(name, layers))
        reason = None if own.keys() == owners(layers).keys() else "the model's run passed some layers by"
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError, ImportError) as error:
        # What a model that cannot be driven like this raises; it may still be served.
        reason = f"the run failed with {type(error).__name__}: {error}"
    if not _everywhere(reason is None):
        return None, reason or "another rank failed"
    where = store(own)
    _log("TurboQuant: calibrated in %.1f s, %s.", time.monotonic() - started, where)
    return own, None


def cache_folder() -> Path:
    return Path(envs.VLLM_CACHE_ROOT) / "turboquant" / "calibration"


def _identity(config: VllmConfig, model: torch.nn.Module, own: Mapping[str, Any]) -> Identity:
    """The same on all ranks of a tensor-parallel group."""
    group = get_tp_group()
    prints: list[str] = [""] * group.world_size
    torch.distributed.all_gather_object(prints, fingerprint(model), group=group.cpu_group)
    facts = configured_identity(config.model_config, group.world_size)
    shapes = {name: (layer.num_kv_heads, layer.head_size) for name, layer in own.items()}
    recipe = RECIPE.limited(config).__dict__
    return Identity(**facts.__dict__ | {"fingerprints": tuple(prints), "layers": shapes, "recipe": recipe})


def _load(path: Path, wanted: Identity, kept: bool) -> tuple[Bases | None, str | None]:
    """kept: in the cache, where files of other users have no business; a file that the user named may be anybody's."""
    exposed = private.problem(path) if kept else None
    if exposed is not None:
        return None, exposed
    try:
        found, bases = load(path, get_tp_group().rank_in_group)
    except CalibrationFileError as error:
        return None, str(error)
    problem = mismatch(found, wanted)
    return (None, problem) if problem else (bases, None)


def _store(path: Path, identity: Identity, own: Bases) -> str:
    """The first rank writes what all have; returns where, or why not: a server can do without."""
    group = get_tp_group()
    first = group.rank_in_group == 0
    bases: list[Any] | None = [None] * group.world_size if first else None
    torch.distributed.gather_object(own, bases, dst=group.first_rank, group=group.cpu_group)
    if bases is not None:
        try:
            save(path, identity, bases)
        except OSError as error:
            return f"not kept in {path} ({error.strerror})"
    return f"kept in {path}"


def _everywhere(true: bool) -> bool:
    """Whether it is true on every rank, those of other data-parallel engines included: they run a model together."""
    group = get_world_group()
    flag = torch.tensor([int(true)])
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(flag.item())


def _log(message: str, *values: object, warn: bool = False) -> None:
    """One line for all ranks."""
    if get_world_group().is_first_rank:
        (logger.warning if warn else logger.info)(message, *values)
