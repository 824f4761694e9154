"""The servers that deploy/ starts: arguments of `vllm serve`, GPUs, environment and mounts, from compose.yaml and kubernetes/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


@dataclass(frozen=True)
class Server:
    """``arguments``: the model, then options of vLLM's engine (`--headless`, which is the server's own, left out)."""

    name: str
    arguments: list[str]
    gpus: int = 1
    dtype: str = "turboquant"
    container: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def _filled(text: str) -> str:
    """Compose's `${NAME:-default}` as without any variable set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def _compose() -> Iterator[Server]:
    for name in ("auto", "turboquant"):
        service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][name]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        yield Server(f"compose-{name}", [_filled(part) for part in service["command"]], len(device["device_ids"]), name)


def _container(name: str, container: dict[str, Any], **values: str) -> Server:
    """``values``: what the operator fills in for `$(NAME)`."""
    command = container.get("command", ["vllm", "serve"])
    assert command in (["vllm", "serve"], ["vllm", "serve", "--headless"])
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], part) for part in container["args"]]
    return Server(name, arguments, int(container["resources"]["limits"]["nvidia.com/gpu"]), container=container)


def _kubernetes() -> Iterator[Server]:
    yield _container("kserve", documents("kserve.yaml")[0]["spec"]["predictor"]["containers"][0])
    group = documents("leaderworkerset.yaml")[0]["spec"]["leaderWorkerTemplate"]
    nodes = {"LWS_GROUP_SIZE": str(group["size"]), "LWS_LEADER_ADDRESS": "leader"}
    for index, role in enumerate(("leader", "worker")):
        container = group[f"{role}Template"]["spec"]["containers"][0]
        yield _container(f"leaderworkerset-{role}", container, **nodes, LWS_WORKER_INDEX=str(index))
    (model,) = documents("production-stack.yaml")[0]["servingEngineSpec"]["modelSpec"]
    yield Server("production-stack", [model["modelURL"], *model["vllmConfig"]["extraArgs"]], model["requestGPU"])


def ray_engine_options() -> dict[str, Any]:
    (application,) = yaml.safe_load(documents("ray-serve.yaml")[0]["spec"]["serveConfigV2"])["applications"]
    (config,) = application["args"]["llm_configs"]
    return dict(config["engine_kwargs"])


SERVERS = [*_compose(), *_kubernetes()]
