"""``vllm-turboquant doctor --url``: what a running server says of itself, through nothing but vLLM's own endpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from .config import FLAG, is_ours
from .facts import Fact, failed, ok, warning
from .kernels.format import DEFAULT_PRESET
from .status import LABEL
from .supported import SUPPORTED, supported_version

TIMEOUT = 10  # seconds
START = f"vllm serve MODEL {FLAG} {DEFAULT_PRESET}"


class _NoAnswer(Exception):
    """Why an endpoint did not answer: half a sentence."""


def server_facts(url: str) -> list[Fact]:
    """Stops where there is no healthy vLLM."""
    base = url.rstrip("/")
    if "://" not in base:
        base = f"http://{base}"
    return list(_facts(base))


def _facts(base: str) -> Iterator[Fact]:
    try:
        _get(f"{base}/health")
    except _NoAnswer as error:
        cure = f"start it ({START}), wait until it is ready, or correct --url"
        yield failed("server", f"{base}/health {error}", cure)
        return
    yield ok("server", f"{base} is healthy")
    try:
        version = str(json.loads(_get(f"{base}/version"))["version"])
        metrics = _get(f"{base}/metrics")
    except (_NoAnswer, ValueError, KeyError, TypeError) as error:
        yield failed(
            "vllm", f"/version and /metrics do not answer as vLLM's do: {error}", f"name a server of vLLM, such as {START}"
        )
        return
    if supported_version(version) is None:
        yield warning("vllm", f"{version} is not supported", f"serve with vLLM {' or '.join(SUPPORTED)}")
    else:
        yield ok("vllm", f"{version}, supported")
    yield _models(base)
    yield from _caches(metrics)


def _get(url: str) -> str:
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            return str(answer.read().decode())
    except HTTPError as error:
        raise _NoAnswer(f"answers {error.code}") from error
    except URLError as error:
        raise _NoAnswer(f"does not answer ({error.reason})") from error
    except (OSError, HTTPException, ValueError) as error:
        raise _NoAnswer(f"does not answer ({error})") from error


def _models(base: str) -> Fact:
    try:
        models: list[dict[str, Any]] = json.loads(_get(f"{base}/v1/models"))["data"]
        named = [f"{model['id']}, requests of up to {model['max_model_len']:,} tokens" for model in models[:1]]
    except (_NoAnswer, ValueError, KeyError, TypeError) as error:
        return warning("model", f"/v1/models: {error}", "an API key may be needed; the other facts do not depend on it")
    return ok("model", "; ".join([*named, *(str(model["id"]) for model in models[1:])]))


def _caches(metrics: str) -> Iterator[Fact]:
    """One fact each engine of the server, from the labels of ``vllm:cache_config_info``."""
    engines = [
        dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))
        for labels in re.findall(r"^vllm:cache_config_info\{(.*)\} ", metrics, re.MULTILINE)
    ]
    if not engines:
        yield failed("kv cache", "/metrics has no vllm:cache_config_info", "start the server without --disable-log-stats")
    for labels in engines:
        name = "kv cache" if len(engines) == 1 else f"kv cache of engine {labels.get('engine')}"
        dtype = labels.get("cache_dtype", "")
        blocks, size, tokens = (labels.get(key, "") for key in ("num_gpu_blocks", "block_size", "kv_cache_size_tokens"))
        held = f"{_number(blocks)} blocks of {size} tokens, {_number(tokens)} tokens"
        if is_ours(dtype):
            yield ok(name, f"{dtype}: {held}")
            yield _compression(labels, name.replace("kv cache", "compression"))
        else:
            yield failed(
                name, f"does not serve turboquant but dtype {dtype}: {held}", f"start the server with {FLAG} {DEFAULT_PRESET}"
            )


def _compression(labels: dict[str, str], name: str) -> Fact:
    """What its workers logged after start-up: layers, bytes, tokens against auto, calibration."""
    line = labels.get(LABEL, "")
    if line:
        return ok(name, line)
    return warning(name, "no worker on the server's own machine said what it compresses", "read TurboQuant's lines in its log")


def _number(digits: str) -> str:
    return f"{int(digits):,}" if digits.isdecimal() else f"an unknown number ({digits or 'no label'}) of"
