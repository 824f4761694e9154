"""``vllm-turboquant doctor`` as users run it: green here, red or warned, with the cure, in set-ups that are really broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vllm_turboquant.facts import Fact
from vllm_turboquant.tables import doctor_text

Outcome = tuple[int, dict[str, dict[str, Any]], str]


def doctor(*options: str, **environment: str) -> Outcome:
    """Exit code, facts by name, and standard error. An empty value takes a variable away."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    settings = {name: value for name, value in settings.items() if value or name not in environment}
    command = [sys.executable, "-m", "vllm_turboquant.cli", "doctor", "--json", *options]
    # Not in the repository, whose egg-info is a distribution too.
    done = subprocess.run(command, env=settings, cwd="/", capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["serves"] is (done.returncode == 0)
    for fact in report["facts"]:
        assert fact["state"] in ("ok", "warning", "failed")
        assert (fact["cure"] is None) is (fact["state"] == "ok"), fact
    assert report["serves"] is not any(fact["state"] == "failed" for fact in report["facts"])
    return done.returncode, {fact["name"]: fact for fact in report["facts"]}, done.stderr


def _first_on_path(folder: Path, name: str, text: str) -> str:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def _without_entry_point(folder: Path) -> str:
    """The first distribution of a name on the path is the one that counts."""
    information = folder / "vllm_turboquant-0.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-turboquant\nVersion: 0.0\n")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def _setups(root: Path) -> dict[str, dict[str, str]]:
    """Name of a set-up to its environment."""
    (root / "nothing").mkdir()
    (root / "file").write_text("in the way")
    broken = root / "broken" / "turboquant" / "calibration"
    broken.mkdir(parents=True)
    (broken / "truncated-0123.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    shared = root / "shared"
    (shared / "turboquant").mkdir(parents=True)
    (shared / "turboquant").chmod(0o777)
    return {
        "good": {"VLLM_CACHE_ROOT": str(root / "new"), "TORCH_COMPILE_DISABLE": "1"},
        "old vLLM": {"PYTHONPATH": _first_on_path(root / "old", "vllm", "__version__ = '0.31.2'\n")},
        "no torch": {"PYTHONPATH": _first_on_path(root / "torchless", "torch", "raise ImportError('libtorch.so: not found')\n")},
        "not installed": {"PYTHONPATH": _without_entry_point(root / "uninstalled")},
        "excluded": {"VLLM_PLUGINS": "another,third"},
        "no compiler": {"PATH": str(root / "nothing"), "TORCH_COMPILE_DISABLE": "", "CXX": "", "VLLM_CACHE_ROOT": str(shared)},
        "file as cache": {"VLLM_CACHE_ROOT": str(root / "file"), "TORCH_COMPILE_DISABLE": "1"},
        "broken calibration": {"VLLM_CACHE_ROOT": str(root / "broken"), "TORCH_COMPILE_DISABLE": "1"},
    }


@pytest.fixture(scope="module")
def outcomes(plugin: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Outcome]]:
    setups = _setups(tmp_path_factory.mktemp("setups"))
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return {name: pool.submit(doctor, **environment) for name, environment in setups.items()}


def test_green_where_all_is_well(outcomes: dict[str, Future[Outcome]]) -> None:
    code, facts, _ = outcomes["good"].result()
    assert code == 0
    assert {fact["state"] for fact in facts.values()} == {"ok"}, facts
    assert list(facts) == [
        *("python", "torch", "vllm", "plugin", "vllm serve", "platform", "self-test", "C++ compiler", "cache folder"),
        "calibration",
    ]
    assert "6 presets agree with float64" in facts["self-test"]["detail"]


RED = {
    "old vLLM": ("vllm", "0.31.2 is not supported; supported are 0.32 and 0.33", "pip install 'vllm==0.33.*'"),
    "no torch": ("torch", "cannot be imported (libtorch.so: not found)", "pip install 'vllm==0.33.*'"),
    "not installed": ("plugin", "vLLM sees no such plugin", "pip install vllm-turboquant"),
    "excluded": ("plugin", "VLLM_PLUGINS=another,third keeps vLLM from loading turboquant", "add turboquant to VLLM_PLUGINS"),
    "no compiler": ("C++ compiler", "there is no g++", "set TORCH_COMPILE_DISABLE=1"),
}


@pytest.mark.parametrize("case", RED)
def test_red_with_the_cure(case: str, outcomes: dict[str, Future[Outcome]]) -> None:
    name, detail, cure = RED[case]
    code, facts, errors = outcomes[case].result()
    assert code == 1, errors[-4000:]
    assert [key for key, fact in facts.items() if fact["state"] == "failed"] == [name]
    assert detail in facts[name]["detail"]
    assert cure in facts[name]["cure"]
    assert "Traceback" not in errors


def test_served_all_the_same_with_a_warning(outcomes: dict[str, Future[Outcome]]) -> None:
    """A server starts so, and doctor's exit code is 0: nothing is kept, or a file is made again."""
    code, facts, _ = outcomes["file as cache"].result()
    assert (code, facts["cache folder"]["state"]) == (0, "warning")
    assert "cannot be written (Not a directory)" in facts["cache folder"]["detail"]
    assert "set VLLM_CACHE_ROOT" in facts["cache folder"]["cure"]
    code, facts, _ = outcomes["broken calibration"].result()
    assert (code, facts["calibration"]["state"]) == (0, "warning")
    assert "truncated-0123.safetensors cannot be read" in facts["calibration"]["detail"]
    assert "delete it" in facts["calibration"]["cure"]
    _, facts, _ = outcomes["no compiler"].result()
    assert facts["cache folder"]["state"] == "warning"
    assert "turboquant can be written by others" in facts["cache folder"]["detail"]
    assert "chmod go-w" in facts["cache folder"]["cure"]


class _Stranger(BaseHTTPRequestHandler):
    """Healthy, and no vLLM."""

    answers: ClassVar[dict[str, str]] = {"/health": ""}
    unknown = 404

    def do_GET(self) -> None:
        self.send_response(200 if self.path in self.answers else self.unknown)
        self.end_headers()
        self.wfile.write(self.answers.get(self.path, "").encode())

    def log_message(self, *_: object) -> None:
        pass


class _Ranks(_Stranger):
    """A vLLM behind an API key, with an engine of each of two data-parallel ranks; labels as vLLM writes them, and a quote."""

    unknown = 401
    answers: ClassVar[dict[str, str]] = {
        "/health": "",
        "/version": '{"version": "0.34.1"}',
        "/metrics": """# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="turboquant-k8v4",engine="0",kv_cache_size_tokens="1600",\
num_gpu_blocks="100",prefix="a\\"} b,c",turboquant="turboquant-k8v4; 2 attention layers compressed"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="fp8",engine="1",kv_cache_size_tokens="None",num_gpu_blocks="1000"} 1.0
""",
    }


@pytest.fixture
def serving() -> Iterator[Callable[[type[_Stranger]], str]]:
    """``serving(handler)``: the address of a server that lives as long as the test."""
    started: list[tuple[HTTPServer, threading.Thread]] = []

    def start(handler: type[_Stranger]) -> str:
        server = HTTPServer(("127.0.0.1", 0), handler)
        started.append((server, threading.Thread(target=server.serve_forever)))
        started[-1][1].start()
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def test_no_server_at_url() -> None:
    with HTTPServer(("127.0.0.1", 0), _Stranger) as server:
        port = server.server_port  # of nobody once it is closed
    code, facts, _ = doctor("--url", f"http://127.0.0.1:{port}")
    assert (code, list(facts)) == (1, ["server"])
    assert "Connection refused" in facts["server"]["detail"]
    assert "vllm serve MODEL --kv-cache-dtype turboquant" in facts["server"]["cure"]


def test_stranger_at_url(serving: Callable[[type[_Stranger]], str]) -> None:
    code, facts, _ = doctor("--url", serving(_Stranger))
    assert code == 1
    assert (facts["server"]["state"], facts["vllm"]["state"]) == ("ok", "failed")
    assert "answers 404" in facts["vllm"]["detail"]


def test_engines_of_one_server_are_told_apart(serving: Callable[[type[_Stranger]], str]) -> None:
    code, facts, _ = doctor("--url", f"http://{serving(_Ranks)}/")
    assert code == 1
    assert (facts["vllm"]["state"], facts["model"]["state"]) == ("warning", "warning")
    assert facts["vllm"]["detail"] == "0.34.1 is not supported"
    assert "answers 401" in facts["model"]["detail"] and "API key" in facts["model"]["cure"]
    first, second = facts["kv cache of engine 0"], facts["kv cache of engine 1"]
    assert (first["state"], first["detail"]) == ("ok", "turboquant-k8v4: 100 blocks of 16 tokens, 1,600 tokens")
    told = facts["compression of engine 0"]
    assert (told["state"], told["detail"]) == ("ok", "turboquant-k8v4; 2 attention layers compressed")
    assert "compression of engine 1" not in facts
    assert (second["state"], second["detail"][:42]) == ("failed", "does not serve turboquant but dtype fp8: 1")


def test_text_is_a_line_a_fact_and_its_cure() -> None:
    facts = [Fact("a", "ok", "fine"), Fact("bb", "failed", "broken", "mend it")]
    assert doctor_text(facts, running=False).splitlines() == [
        "ok       a   fine",
        "failed   bb  broken",
        "             cure: mend it",
        "turboquant cannot be served: 1 failed",
    ]
    assert doctor_text(facts[:1], running=True).splitlines()[-1] == "turboquant is served"
