"""Dockerfile and compose.yaml: by hadolint and by Docker Compose itself, which need no daemon, and in what these do not see."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_turboquant.supported import supported_version

from .commands import DEPLOY

ROOT = DEPLOY.parent
DOCKERFILE = DEPLOY / "Dockerfile"


def run(tool: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(tool, path=path)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"no {tool}; the extra `test` installs it")
        pytest.skip(f"no {tool} here")
    return subprocess.run([found, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_hadolint() -> None:
    done = run("hadolint", "--no-color", str(DOCKERFILE))
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_hadolint_sees(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("USER 10001:0\n", "").replace("python:3.12-slim-bookworm", "python"))
    done = run("hadolint", "--no-color", str(broken))
    assert done.returncode != 0 and "DL3002" in done.stdout and "DL3006" in done.stdout, done.stdout + done.stderr


def instructions() -> list[tuple[str, str]]:
    """Of the last stage."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    last = max(number for number, (name, _) in enumerate(lines) if name == "FROM")
    return [(name, rest) for name, rest in lines[last:]]


def test_image() -> None:
    found = instructions()
    values = {name: rest for name, rest in found if name in ("USER", "VOLUME", "ENTRYPOINT", "HEALTHCHECK", "LABEL", "ENV")}
    base = re.findall(r"^ARG VLLM_IMAGE=vllm/vllm-openai:v(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert [supported_version(version) for version in base] == ["0.33"]
    assert int(values["USER"].split(":")[0]) > 0
    assert json.loads(values["VOLUME"]) == ["/cache"]
    environment = dict(part.split("=", 1) for part in values["ENV"].split())
    assert environment["VLLM_CACHE_ROOT"].startswith("/cache/") and environment["HF_HOME"].startswith("/cache/")
    assert "/health" in values["HEALTHCHECK"]
    assert {"title", "version", "revision", "created", "licenses"} <= set(
        re.findall(r"opencontainers\.image\.(\w+)=", values["LABEL"])
    )
    assert any(name == "RUN" and "--no-deps" in rest for name, rest in found)


def test_build_context_is_the_wheel_s_sources() -> None:
    """What .dockerignore lets through is what pyproject.toml names, and no more."""
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(kept) == ["LICENSE", "README.md", "kernels", "pyproject.toml", "vllm_turboquant"]
    assert all((ROOT / name).exists() for name in kept)


def compose(*profiles: str, **environment: str) -> dict[str, Any]:
    """The configuration as Docker Compose understands it: profiles chosen, variables filled in, paths resolved."""
    chosen = [argument for profile in profiles for argument in ("--profile", profile)]
    done = run("docker-compose", "--file", str(DEPLOY / "compose.yaml"), *chosen, "config", "--format", "json", **environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)["services"]  # type: ignore[no-any-return]


def test_compose_profiles() -> None:
    watching = {"prometheus", "grafana"}
    assert set(compose()) == watching
    assert set(compose("turboquant")) == watching | {"turboquant"}
    assert set(compose("auto", "turboquant")) == watching | {"auto", "turboquant"}


def test_compose_on_one_card_and_on_two() -> None:
    def devices(services: dict[str, Any]) -> list[list[str]]:
        return [
            services[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for name in ("auto", "turboquant")
        ]

    one = compose("auto", "turboquant")
    assert devices(one) == [["0"], ["0"]]
    shares = [float(one[name]["command"][-1]) for name in ("auto", "turboquant")]
    assert sum(shares) < 0.95  # of one card
    # vLLM measures free memory as it starts.
    assert one["turboquant"]["depends_on"]["auto"]["condition"] == "service_healthy"
    two = compose(
        "auto", "turboquant", GPU_TURBOQUANT="1", GPU_MEMORY="0.9", MODEL="some/model", KV_CACHE_DTYPE="turboquant-k3v3"
    )
    assert devices(two) == [["0"], ["1"]]
    assert two["turboquant"]["command"] == [
        "some/model",
        "--kv-cache-dtype",
        "turboquant-k3v3",
        "--gpu-memory-utilization",
        "0.9",
    ]


def test_compose_mounts_what_is_here_and_publishes_to_this_machine_only() -> None:
    services = compose("auto", "turboquant")
    sources = [v["source"] for s in services.values() for v in s["volumes"] if v["type"] == "bind"]
    assert len(sources) == 3 and all(Path(source).exists() for source in sources)
    assert {port["host_ip"] for s in services.values() for port in s["ports"]} == {"127.0.0.1"}
    for name in ("auto", "turboquant"):
        assert [v["target"] for v in services[name]["volumes"]] == ["/cache"]
        assert Path(services[name]["build"]["context"]) == ROOT
