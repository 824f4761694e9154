"""``GET /turboquant``: what this server keeps in its KV cache, as JSON, or as a page for browsers.

Entry point ``turboquant-status`` of vLLM's group ``vllm.endpoint_plugins``; vLLM loads it only where ``VLLM_PLUGINS`` names it,
beside ``turboquant`` itself. Says no path and nothing of requests, as vLLM asks no API key for it.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.datastructures import State
from vllm.config import VllmConfig
from vllm.v1.metrics.prometheus import get_prometheus_registry

from . import __version__
from .config import AUTO, OFF, TurboQuantSettings, is_ours, stored
from .endpoint_layers import WorkerLayers, fingerprint_of_ranks, merged
from .endpoint_page import render

PATH = "/turboquant"
_USAGE, _RUNNING, _WAITING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"


class Kept(BaseModel):
    """A layer whose state is not compressed."""

    layer: str
    reason: str


class Layers(BaseModel):
    """Layers with keys and values or another state; ``shared``: compressed ones that read another layer's cache."""

    compressed: int
    shared: int
    kept: list[Kept]


class Calibration(BaseModel):
    """``setting``: auto, off or file. ``fitted``: whether keys are stored under a fitted transform, else at most a key bias is
    subtracted. ``layers``: where either is. ``fingerprint``: equal on servers that can read each other's pages."""

    setting: str
    fitted: bool
    layers: int
    fingerprint: str | None = Field(description="None where keys are stored as they are.")


class Capacity(BaseModel):
    """Bytes are of one token in all layers and on all ranks. ``auto``: the same memory with --kv-cache-dtype auto."""

    tokens: int
    bytes_per_token: float
    auto_tokens: int
    auto_bytes_per_token: float
    times_auto: float


class Pool(BaseModel):
    """Now. ``usage``: share of the pool's blocks that running requests hold; blocks kept for prefix hits count as free."""

    usage: float
    tokens: int
    running: int
    waiting: int


class Status(BaseModel):
    """What ``GET /turboquant`` answers."""

    version: str
    model: str
    kv_cache_dtype: str
    preset: str | None = Field(description="None where the server compresses nothing.")
    stored: str | None
    max_model_len: int
    layers: Layers | None
    calibration: Calibration | None
    capacity: Capacity | None
    pool: Pool | None = Field(description="None with --disable-log-stats.")


class StatusEndpoint:
    """vLLM's EndpointPlugin."""

    name = "turboquant-status"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the route."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Asks the workers once: what they compress does not change while they run."""
        config: VllmConfig = engine_client.vllm_config
        preset = compressing(config)
        workers: list[WorkerLayers] = []
        if preset is not None:
            workers = [WorkerLayers(**worker) for worker in await engine_client.collective_rpc("turboquant_layers")]
        name = args.served_model_name[0] if args.served_model_name else config.model_config.model
        state.turboquant_status = describe(config, preset, workers, name)


def compressing(config: VllmConfig) -> str | None:
    """The preset of the model's layers, else of its drafter's; None where no layer can be compressed."""
    skipped = set(config.cache_config.kv_cache_dtype_skip_layers)
    everything = {str(layer) for layer in range(config.model_config.get_total_num_hidden_layers())}
    drafter = getattr(config.speculative_config, "kv_cache_dtype", None)
    dtypes = [] if everything <= skipped else [config.cache_config.cache_dtype]
    return next((str(dtype) for dtype in (*dtypes, drafter) if is_ours(dtype)), None)


def describe(config: VllmConfig, preset: str | None, workers: list[WorkerLayers], name: str) -> Status:
    """The status without the pool's use. name: of the model, as it is served; of a path the last part."""
    cache = config.cache_config
    status = Status(
        version=__version__,
        model=name.rstrip("/").rpartition("/")[2],
        kv_cache_dtype=str(cache.cache_dtype),
        preset=preset,
        stored=None,
        max_model_len=config.model_config.max_model_len,
        layers=None,
        calibration=None,
        capacity=None,
        pool=None,
    )
    if preset is None or not workers:
        return status
    whole = merged(workers)
    status.stored = stored(preset)
    kept = [Kept(layer=layer, reason=reason) for layer, reason in whole.kept.items()]
    status.layers = Layers(compressed=len(whole.compressed), shared=len(whole.shared), kept=kept)
    setting = TurboQuantSettings.from_additional_config(config.additional_config).calibration
    status.calibration = Calibration(
        setting=setting if setting in (AUTO, OFF) else "file",
        fitted=whole.fitted,
        layers=len(whole.based),
        fingerprint=fingerprint_of_ranks(workers),
    )
    tokens = cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size
    times = whole.auto_bytes / whole.bytes
    status.capacity = Capacity(
        tokens=tokens,
        bytes_per_token=whole.bytes,
        auto_tokens=int(tokens / times),
        auto_bytes_per_token=whole.auto_bytes,
        times_auto=round(times, 3),
    )
    return status


def pool_now(tokens: int) -> Pool | None:
    """From the samples that /metrics exports too, of all engines of this server; None where there are none."""
    found: dict[str, list[float]] = {name: [] for name in (_USAGE, _RUNNING, _WAITING)}
    for family in get_prometheus_registry().collect():
        for sample in family.samples:
            if sample.name in found:
                found[sample.name].append(sample.value)
    usage = found[_USAGE]
    if not usage:
        return None
    share = sum(usage) / len(usage)
    running, waiting = (int(sum(found[name])) for name in (_RUNNING, _WAITING))
    return Pool(usage=round(share, 4), tokens=round(share * tokens), running=running, waiting=waiting)


router = APIRouter(tags=["turboquant"])


@router.get(PATH, response_model=Status, responses={200: {"content": {"text/html": {}}}})
def turboquant_status(request: Request) -> Any:
    """What the KV cache keeps, in which form, and how full it is. A page for those who accept text/html, else JSON."""
    fixed: Status = request.app.state.turboquant_status
    capacity = fixed.capacity
    status = fixed.model_copy(update={"pool": None if capacity is None else pool_now(capacity.tokens)})
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(render(status.model_dump()), headers={"Vary": "Accept"})
    return status
