"""deploy/kubernetes: well formed by schemas, and consistent in what no schema says.

Kubernetes' own kinds, pods inside other kinds included, by the schemas of the package kubernetes-validate; the other kinds
by ``schemas.py``, which knows the fields that these files use.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from vllm_turboquant import __version__

from . import schemas
from .commands import DEPLOY, KUBERNETES, SERVERS, documents

KUBERNETES_VERSION = "1.33"
CACHE = "/cache"  # VOLUME of the image
FILES = {
    "kserve.yaml": schemas.INFERENCE_SERVICE,
    "leaderworkerset.yaml": schemas.LEADER_WORKER_SET,
    "ray-serve.yaml": schemas.RAY_SERVICE,
    "production-stack.yaml": schemas.PRODUCTION_STACK,
}
Pod = dict[str, Any]


def templates(document: dict[str, Any]) -> Iterator[Pod]:
    """Spec and metadata of all pods that the first document of a file makes."""
    spec = document.get("spec", {})
    if predictor := spec.get("predictor"):
        yield {"spec": {key: value for key, value in predictor.items() if key not in schemas.PREDICTOR_OWN}}
    if group := spec.get("leaderWorkerTemplate"):
        yield from (group["leaderTemplate"], group["workerTemplate"])
    if cluster := spec.get("rayClusterConfig"):
        yield from (group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))


def validate(name: str, found: list[dict[str, Any]]) -> None:
    """Raises jsonschema's or kubernetes-validate's error for the first thing that a schema forbids."""
    first, *rest = found
    jsonschema.validate(first, FILES[name], cls=jsonschema.Draft202012Validator)
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}} | template for template in templates(first)]
    for document in [*pods, *rest]:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    if "serveConfigV2" in first.get("spec", {}):
        jsonschema.validate(yaml.safe_load(first["spec"]["serveConfigV2"]), schemas.RAY_APPLICATIONS)


def test_every_file_is_here() -> None:
    assert sorted(path.name for path in KUBERNETES.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_schema(name: str) -> None:
    validate(name, documents(name))


def misspelt_probe(found: list[dict[str, Any]]) -> None:
    container = found[0]["spec"]["predictor"]["containers"][0]
    container["readinesProbe"] = container.pop("readinessProbe")


def gpus_in_the_wrong_place(found: list[dict[str, Any]]) -> None:
    found[0]["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["resources"] = {"nvidia.com/gpu": "8"}


def no_size(found: list[dict[str, Any]]) -> None:
    del found[0]["spec"]["leaderWorkerTemplate"]["size"]


def arguments_of_the_engine_beside_it(found: list[dict[str, Any]]) -> None:
    found[0]["spec"]["serveConfigV2"] = found[0]["spec"]["serveConfigV2"].replace("engine_kwargs:", "engine_args:")


def claim_of_no_size(found: list[dict[str, Any]]) -> None:
    found[1]["spec"]["resources"] = {"request": {"storage": "1Ti"}}


def flag_beside_the_arguments(found: list[dict[str, Any]]) -> None:
    found[0]["servingEngineSpec"]["modelSpec"][0]["extraArgs"] = ["--kv-cache-dtype", "turboquant"]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("kserve.yaml", misspelt_probe),
        ("leaderworkerset.yaml", gpus_in_the_wrong_place),
        ("leaderworkerset.yaml", no_size),
        ("leaderworkerset.yaml", claim_of_no_size),
        ("ray-serve.yaml", arguments_of_the_engine_beside_it),
        ("production-stack.yaml", flag_beside_the_arguments),
    ],
)
def test_schema_sees(name: str, spoil: Callable[[list[dict[str, Any]]], None]) -> None:
    found = copy.deepcopy(documents(name))
    spoil(found)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(name, found)


PODS = [(name, pod) for name in FILES for pod in templates(documents(name)[0])]


@pytest.mark.parametrize(("name", "pod"), PODS, ids=[f"{name}-{pod['spec']['containers'][0]['name']}" for name, pod in PODS])
def test_pod(name: str, pod: Pod) -> None:
    """Volumes are what mounts ask for, GPUs are asked for as they are limited, the cache outlives the pod."""
    spec = pod["spec"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    claims = {document["metadata"]["name"] for document in documents(name)[1:] if document["kind"] == "PersistentVolumeClaim"}
    (container,) = spec["containers"]
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container.get("volumeMounts", [])}
    assert len(mounts) == len(volumes)
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert container["resources"]["requests"].get("nvidia.com/gpu") == gpus
    if gpus is None:
        assert container["name"] == "ray-head"
        return
    assert mounts[CACHE]["persistentVolumeClaim"]["claimName"] in claims
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"  # ranks of vLLM meet there
    assert spec["securityContext"] == {"runAsNonRoot": True, "fsGroup": 10001}


@pytest.mark.parametrize("server", [s for s in SERVERS if s.container], ids=str)
def test_probes(server: Any) -> None:
    """Of /health at the port that is served; a headless server serves none."""
    ports = {port["containerPort"] for port in server.container.get("ports", [])}
    probes = {kind: server.container.get(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")}
    if server.name.endswith("-worker"):
        assert "--headless" in server.container["command"] and not ports and set(probes.values()) == {None}
        return
    assert ports == {8000}
    for probe in probes.values():
        assert probe["httpGet"] == {"path": "/health", "port": 8000}


def test_images_are_of_this_version() -> None:
    text = "".join(path.read_text() for path in [*KUBERNETES.iterdir(), DEPLOY / "compose.yaml"])
    assert set(re.findall(r"vllm-turboquant(?:-ray)?:(\S+)", text)) == {__version__}
    assert documents("production-stack.yaml")[0]["servingEngineSpec"]["modelSpec"][0]["tag"] == __version__
    assert f"ARG VERSION={__version__}\n" in (DEPLOY / "Dockerfile").read_text()


def test_nodes_share_a_cache() -> None:
    group, claim, service = documents("leaderworkerset.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    leader = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    assert service["spec"]["selector"]["role"] == leader["metadata"]["labels"]["role"]
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/name"] == group["metadata"]["name"]
